// Passes over one row of logits: sums of exponentials, and writing a row of a gradient. For kernels, see simd.h.
#pragma once

#include "cpu/simd.h"
#include "launch/arguments.h"

namespace xtoken::cpu::XTOKEN_LEVEL {

// Floats are added in lanes for this many elements, then in double.
constexpr int64_t flush = 128 * lanes;
// How far ahead a row is fetched, in elements; the processor's own prefetching ends at each page.
constexpr int64_t ahead = 4096;

// Calls body(static_cast<const T*>(p)) with the type of the elements.
template <typename Body>
inline auto typed(Element type, const void* p, Body body) {
    if (type == Element::bfloat16) return body(static_cast<const BFloat16*>(p));
    if (type == Element::float16) return body(static_cast<const Float16*>(p));
    return body(static_cast<const float*>(p));
}

// The element type of a pointer, without references and const.
template <typename T>
struct Element_of {
    using type = T;
};
template <typename T>
struct Element_of<const T&> {
    using type = T;
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The one clamp of logits.
inline Floats at_least(Floats x, float lowest) { return max(broadcast(lowest), x); }
inline float at_least(float x, float lowest) { return x < lowest ? lowest : x; }
// Its derivative times g. Where `Exponential::raises` is false, g is zero there anyway if it is a multiple of e.
inline Floats unless_raised(Floats x, float lowest, Floats g) {
    return select(greater(broadcast(lowest), x), broadcast(0.0f), g);
}

// A row of logits, all of it in order. Of elements of 16 bits rough exponentials are good enough.
template <typename T>
struct WholeRow {
    static constexpr bool is_rough = sizeof(T) == 2;
    const T* p;
    Floats at(int64_t i) const {
        prefetch(p + i + ahead);
        return load(p + i);
    }
    Floats tail(int64_t i, int64_t n) const { return load(p + i, n, broadcast(0.0f)); }
};

// The exponentials of a row's elements, as they are in its sum.
template <typename T>
struct ElementExponential : Exponential {
    Floats operator()(Floats x) const {
        return WholeRow<T>::is_rough ? rough(relative(x)) : Exponential::operator()(x);
    }
};

// A row's elements at the columns `index`, which is padded to whole vectors.
template <typename T>
struct PickedRow {
    static constexpr bool is_rough = sizeof(T) == 2;
    const T* p;
    const int32_t* index;
    Floats at(int64_t i) const { return gather(p, index + i); }
    Floats tail(int64_t i, int64_t) const { return gather(p, index + i); }
};

// Calls body(i, row[i ... i + 15], count) for i = 0, 16, ... below n; only the first `count` lanes of the last vector
// are elements of the row.
template <typename Row, typename Body>
inline void each_vector(const Row& row, int64_t n, Body body) {
    const int64_t whole = n / lanes * lanes;
    for (int64_t i = 0; i < whole; i += lanes) body(i, row.at(i), lanes);
    if (whole < n) body(whole, row.tail(whole, n - whole), n - whole);
}

// The exponentials of a row, e_i = exp((max(row_i, lowest) - centre) / temperature), and their sum.
struct Normaliser {
    Exponential exp;
    float centre;
    double total;
    float lowest = 0.0f;
    float top = 0.0f;  // the largest logit, or the centre if that is larger

    double log_sum() const { return ::log(total) + exp.log_unit(); }
};

// Calls body(i, e, relative, cut) with the exponentials of each 16 elements (zero beyond n) and max(row, lowest) -
// centre, in order, perhaps twice over all; `cut` is the latter too, but not below what makes e zero. The unit comes
// from the largest of the first elements; if one that follows is larger by far, everything is done again.
template <typename Row, typename Body>
inline Normaliser each_exponential(const Row& row, int64_t n, float lowest, double temperature, Body body) {
    Floats top = broadcast(lowest);
    each_vector(row, smaller(n, 4096), [&](int64_t, Floats x, int64_t count) {
        top = max(count < lanes ? select(first(count), x, broadcast(lowest)) : x, top);
    });
    float centre = largest(top);
    for (;;) {
        Normaliser result{Exponential::around(centre, lowest, temperature), centre, 0.0, lowest};
        DoubleSum total;
        Floats part = broadcast(0.0f);
        top = broadcast(centre);
        const Exponential exp = result.exp;
        const auto relative = [=](Floats x) { return at_least(x, lowest) - broadcast(centre); };
        const int64_t whole = n / lanes * lanes;
        for (int64_t begin = 0; begin < whole; begin += flush) {
            const int64_t end = smaller(begin + flush, whole);
            for (int64_t i = begin; i < end; i += lanes) {
                const Floats x = row.at(i);
                top = max(x, top);
                const Floats cut = exp.relative(x);
                const Floats e = Row::is_rough ? exp.rough(cut) : exp.of_relative(cut);
                part += e;
                body(i, e, relative(x), cut);
            }
            total.add(part);
            part = broadcast(0.0f);
        }
        if (whole < n) {
            const Floats x = row.tail(whole, n - whole);
            const Mask valid = first(n - whole);
            top = max(select(valid, x, top), top);
            const Floats cut = exp.relative(x);
            const Floats all = Row::is_rough ? exp.rough(cut) : exp.of_relative(cut);
            const Floats e = select(valid, all, broadcast(0.0f));
            total.add(e);
            body(whole, e, relative(x), cut);
        }
        const float found = largest(top);
        if (!(found > centre + 30 * temperature) || found > 3e38f) {
            result.total = total.total();
            result.top = found;
            return result;
        }
        centre = found;
    }
}

template <typename Row, typename Store>
inline Normaliser exponentials(const Row& row, int64_t n, float lowest, double temperature, Store store) {
    return each_exponential(row, n, lowest, temperature, [&](int64_t i, Floats e, Floats, Floats) { store(i, e); });
}

// Where a row of a gradient goes: `width` elements, of which those from n on become zero.
struct Target {
    void* row;
    int64_t n, width;
};

// row[i ... i + 15] = value(i), converted; past the caches if the row is aligned for that.
template <typename T, typename Value>
inline void write_row(const Target& target, const T*, Value value) {
    T* out = static_cast<T*>(target.row);
    const int64_t whole = target.n / lanes * lanes;
    if (reinterpret_cast<uintptr_t>(out) % (lanes * sizeof(T)) == 0) {
        for (int64_t i = 0; i < whole; i += lanes) stream(out + i, value(i));
        fence();
    } else {
        for (int64_t i = 0; i < whole; i += lanes) store(out + i, value(i));
    }
    if (whole < target.n) store(out + whole, target.n - whole, value(whole));
    for (int64_t i = target.n; i < target.width; ++i) out[i] = T{};
}

// row[i] = table[bits of z[i]], for elements of 16 bits; past the caches if the row is aligned for that.
template <typename T>
inline void write_looked_up(const Target& target, const T* z, const T* table) {
    constexpr int64_t part_size = 512, line = 64 / sizeof(T);
    T* out = static_cast<T*>(target.row);
    const bool aligned = reinterpret_cast<uintptr_t>(out) % 64 == 0;
    const int64_t whole = target.n / part_size * part_size;
    const auto look_up = [table](uint64_t four, int at) {
        return static_cast<uint64_t>(table[four >> at & 0xFFFF].bits) << at;
    };
    for (int64_t begin = 0; begin < whole; begin += part_size) {
        alignas(64) T part[part_size];
        for (int64_t i = 0; i < part_size; i += 4) {
            uint64_t four;
            memcpy(&four, z + begin + i, sizeof(four));
            four = look_up(four, 0) | look_up(four, 16) | look_up(four, 32) | look_up(four, 48);
            memcpy(part + i, &four, sizeof(four));
        }
        for (int64_t i = 0; aligned && i < part_size; i += line) stream_line(out + begin + i, part + i);
        if (!aligned) memcpy(out + begin, part, sizeof(part));
    }
    if (aligned) fence();
    for (int64_t i = whole; i < target.n; ++i) out[i] = table[z[i].bits];
    for (int64_t i = target.n; i < target.width; ++i) out[i] = T{};
}

// The cross-entropy part of a row's gradient: weight * exp(z) - onehot * scale.
struct LabelTerm {
    bool present = false;
    int64_t label = -1;
    float scale = 0.0f;   // of the one-hot
    float weight = 0.0f;  // scale / sum of the exponentials
    Exponential exp = Exponential::around(0.0f, 0.0f, 1.0);

    // The one-hot's part of lanes i ... i + 15.
    Floats without_label(int64_t i, Floats x) const {
        if (label < i || label >= i + lanes) return x;
        return select(from_bits(1u << (label - i)), x - broadcast(scale), x);
    }
};

// Writes the row's cross-entropy and prepares its gradient; `one` is the row's normaliser at temperature 1.
template <typename T>
inline LabelTerm label_term(const Labels& labels, int64_t r, const T* z, const Normaliser& one) {
    LabelTerm term;
    term.present = true;
    term.label = labels.ids[r];
    term.scale = static_cast<float>(*labels.scale);
    term.weight = static_cast<float>(*labels.scale / one.total);
    term.exp = one.exp;
    labels.losses[r] = one.log_sum() - static_cast<double>(at_least(widened(z[term.label]), one.lowest));
    return term;
}

// The same for a row [n] that may have no label. `known` is its normaliser at temperature 1, if there is one.
template <typename T>
inline LabelTerm label_term_if_any(const Labels& labels, int64_t r, const T* z, int64_t n, float lowest,
                                   const Normaliser* known = nullptr) {
    if (labels.of(r) < 0) {
        if (labels.ids != nullptr) labels.losses[r] = 0;
        return {};
    }
    if (known != nullptr) return label_term(labels, r, z, *known);
    return label_term(labels, r, z, exponentials(WholeRow<T>{z}, n, lowest, 1.0, [](int64_t, Floats) {}));
}

}  // namespace xtoken::cpu::XTOKEN_LEVEL
