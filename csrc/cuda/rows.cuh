// What the kernels share: passes of a block over a row, and sums over a block.
//
// Exponentials are of differences to a row's maximum, sums within a thread are of a few hundred floats, and those of
// the threads are added as doubles in a fixed order: results do not depend on anything but the shape of the launch.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/elements.cuh"

namespace xtoken::cuda {

constexpr int warp_size = 32;
constexpr unsigned all_lanes = 0xffffffffu;
constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;

// As torch's clamp_min: not a number stays what it is.
__device__ inline float at_least(float x, float lowest) { return largest(x, lowest); }

// Shares the elements of two rows out among the threads of the block, 16 bytes of the first row at a time: body(i, x,
// y) with x and y a float[R::vector], or float[1] at the ends of a first row that does not begin or end at such a
// boundary. Pairs of different alignment of the first row are shared out differently. The second row is copied ahead,
// too, if it is aligned alike.
template <typename R, typename Other, typename Body>
__device__ void each_pair(const R& row, const Other& other, int size, Body body) {
    constexpr int N = R::vector;
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int head = min(size, row.head()), count = (size - head) / N, whole = count * N;
    for (int i = thread; i < size - whole; i += threads) {
        const int at = i < head ? i : i + whole;
        const float x[1] = {row[at]};
        typename Other::template Elements<1> y;
        other.elements(at, y);
        body(at, x, y);
    }
    const auto place = [&](int v) { return head + v * N; };
    // A loop of its own for each, since one with a load in place of the copy waits for it either way.
    const auto vectors = [&](auto alike) {
        Ring ring;
        const auto load = [&](int v) {
            if (v < count) {
                row.load(ring, place(v));
                if constexpr (decltype(alike)::value) other.template load<N>(ring, place(v), 1);
            }
            ring.push();
        };
#pragma unroll
        for (int k = 0; k < Ring::depth; ++k) load(thread + k * threads);
#pragma unroll 1  // code that fits the instruction cache, and compiles in time
        for (int v = thread; v < count; v += threads) {
            float x[N];
            typename Other::template Elements<N> y;
            ring.wait();
            row.take(ring, x);
            if constexpr (decltype(alike)::value) {
                other.take_beside(ring, place(v), y);
            } else {
                other.elements(place(v), y);
            }
            load(v + Ring::depth * threads);
            body(place(v), x, y);
        }
    };
    if constexpr (Other::copied == Copied::if_aligned) {
        if (other.template aligned<N>(head)) return vectors(std::true_type{});
    }
    vectors(std::bool_constant<Other::copied == Copied::always>{});
}

// In the place of a second row.
struct NoRow {
    static constexpr Copied copied = Copied::never;
    template <int N>
    struct Elements {};
    template <int N>
    __device__ void load(const Ring&, int, int) const {}
    template <int N>
    __device__ void take_beside(const Ring&, int, Elements<N>&) const {}
    template <int N>
    __device__ void elements(int, Elements<N>&) const {}
};

// The same for one row: body(i, x).
template <typename R, typename Body>
__device__ void each_vector(const R& row, int size, Body body) {
    each_pair(row, NoRow{}, size, [&](int i, const auto& x, const auto&) { body(i, x); });
}

// The same for chosen elements of a row: body(j, x) with x[0] = row[chosen[j]].
template <typename R, typename Body>
__device__ void each_chosen(const R& row, const int32_t* chosen, int columns, Body body) {
#pragma unroll 4
    for (int j = static_cast<int>(threadIdx.x); j < columns; j += static_cast<int>(blockDim.x)) {
        const float x[1] = {row[chosen[j]]};
        body(j, x);
    }
}

// All of the row if `chosen` is null.
template <typename R, typename Body>
__device__ void each_column(const R& row, const int32_t* chosen, int columns, Body body) {
    if (chosen == nullptr) return each_vector(row, columns, body);
    each_chosen(row, chosen, columns, body);
}

// Where each_partner's body does not look at places.
struct NoPlaces {};

// Copies the places of a vector into the slots behind the row's, and the row's vector by `copy_beside`, which is in
// both branches since copies side by side take fewer instructions. One by one where places are not aligned to 16 bytes.
template <int N, typename Copy>
__device__ void copy_places(const Ring& ring, const int32_t* from, bool by_four, Copy copy_beside) {
    if (by_four) {
#pragma unroll
        for (int k = 0; k < N; k += 4) copy_async<16, (N > 4)>(ring.slot(1 + k / 4), from + k);
        return copy_beside();
    }
    copy_beside();
#pragma unroll 1  // not by predicates, which the usual case would pay for
    for (int k = 0; k < N; ++k) copy_async<4>(reinterpret_cast<int32_t*>(ring.slot(1 + k / 4)) + k % 4, from + k);
}

// The elements x of z from i on, and those of another row at `places` (negative: any of them, or 0): body(i, x, place,
// y), elements shared out as by each_pair. Gathers are a vector ahead of their use. Without `with_places` the body must
// not look at them, and y is -inf where a place is negative.
template <bool with_places = true, typename R, typename Body>
__device__ void each_partner(const R& z, const AnyRow& other, const int32_t* places, int size, Body body) {
    constexpr int N = R::vector;
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int head = min(size, z.head()), count = (size - head) / N, whole = count * N;
    for (int i = thread; i < size - whole; i += threads) {
        const int at = i < head ? i : i + whole;
        const float x[1] = {z[at]};
        const int32_t place[1] = {places[at]};
        uint32_t bits[1] = {};
        other.template gather_bits<!with_places>(place, bits);
        float y[1];
        other.gathered(bits, y);
        body(at, x, place, y);
    }
    const bool by_four = reinterpret_cast<uintptr_t>(places + head) % 16 == 0;
    const R vectors = z.from(head);
    const auto start = [&](int v) { return head + v * N; };
    Ring ring;
    const auto load = [&](int v) {
        if (v < count) {
            copy_places<N>(ring, places + start(v), by_four, [&] { vectors.load(ring, v * N); });
        }
        ring.push();
    };
    const auto places_of = [&](int32_t (&place)[N]) {
#pragma unroll
        for (int k = 0; k < N; k += 4) {
            uint32_t four[4];
            read_copied(ring.slot(1 + k / 4), four);
            memcpy(place + k, four, sizeof four);
        }
    };
#pragma unroll
    for (int k = 0; k < Ring::depth; ++k) load(thread + k * threads);
    uint32_t ahead[N] = {};
    ring.wait();
    if (thread < count) {
        int32_t place[N];
        places_of(place);
        other.template gather_bits<!with_places>(place, ahead);
    }
#pragma unroll 1  // as in each_pair
    for (int v = thread; v < count; v += threads) {
        float x[N], y[N];
        [[maybe_unused]] std::conditional_t<with_places, int32_t[N], NoPlaces> place;
        z.take(ring, x);
        if constexpr (with_places) places_of(place);
        other.gathered(ahead, y);
        load(v + Ring::depth * threads);
        ring.wait();
        if (v + threads < count) {
            int32_t next[N];
            places_of(next);
            other.template gather_bits<!with_places>(next, ahead);
        }
        body(start(v), x, place, y);
    }
}

// Writes a row, whose elements are computed in the order of another.
template <typename T>
class Written {
  public:
    __device__ Written(const Row<T>& order, T* out)
        : out_(base(out)),
          apart_(in_register(static_cast<uint32_t>(
              (reinterpret_cast<uintptr_t>(order.data) - reinterpret_cast<uintptr_t>(out)) % 16))) {}

    // From i on; with one more element than one, a vector of `order`.
    template <int N>
    __device__ void put(int i, const float (&g)[N]) const {
        T result[N];
#pragma unroll
        for (int k = 0; k < N; ++k) narrow(g[k], result[k]);
        T* out = in_register(out_ + i);
        if constexpr (N > 1) {
            if (apart_ == 0) {
                uint4 raw;
                memcpy(&raw, result, sizeof raw);
                __stcs(reinterpret_cast<uint4*>(out), raw);  // not read again: keeps the rows in L2
                return;
            }
        }
#pragma unroll
        for (int k = 0; k < N; ++k) out[k] = result[k];
    }
    // Zeros from `begin` up to `end`.
    __device__ void fill(int begin, int end) const {
        constexpr int N = 16 / sizeof(T);
        T zero;
        narrow(0.0f, zero);
        const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
        const auto past = static_cast<int>(reinterpret_cast<uintptr_t>(out_ + begin) % 16 / sizeof(T));
        const int first = min(begin + (N - past) % N, end), behind = first + (end - first) / N * N;
        for (int i = begin + thread; i < first; i += threads) out_[i] = zero;
        for (int i = first + N * thread; i < behind; i += N * threads) {
            __stcs(reinterpret_cast<uint4*>(out_ + i), make_uint4(0, 0, 0, 0));
        }
        for (int i = behind + thread; i < end; i += threads) out_[i] = zero;
    }

  private:
    T* out_;
    uint32_t apart_;  // bytes modulo 16
};

// Writes a row: each(body) calls body(i, x, ...) as each_pair and its like do for the elements x of `z` from i on, and
// prepare(i, x, ..., g) finds as many g, which go to out + i; zeros follow up to `width`. `out` may be the first row.
template <typename T, typename Each, typename Prepare>
__device__ void write_row(const Row<T>& z, T* out, int size, int width, Each each, Prepare prepare) {
    const Written<T> written(z, out);
    each([&](int i, const auto& x, const auto&... beside) {
        float g[sizeof(x) / sizeof(float)];
        prepare(i, x, beside..., g);
        written.put(i, g);
    });
    written.fill(size, width);
}

// The same of one row: prepare(i, x, g).
template <typename T, typename Prepare>
__device__ void write_row(const Row<T>& z, T* out, int size, int width, Prepare prepare) {
    write_row(z, out, size, width, [&](auto body) { each_vector(z, size, body); }, prepare);
}

// Calls body(list, of_all, begin, end) for a warp's slices of SELL-C-sigma lists (C = 32), whose lane l has four
// entries at a time, those from 32 i + 4 l on, i a multiple of 4. Of the first `shared` slices all lanes have a part of
// one list, else each lane has a list of its own, or none (list >= lists).
template <typename Lists, typename Body>
__device__ void each_slice(const Lists& lists, Body body) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % warp_size;
    const int warps = static_cast<int>(blockDim.x) / warp_size;
#pragma unroll 1
    for (int slice = thread / warp_size; slice < lists.slices; slice += warps) {
        const bool of_all = slice < lists.shared;
        const int list = of_all ? slice : lists.shared + (slice - lists.shared) * warp_size + lane;
        body(list, of_all, lists.start[slice], lists.start[slice + 1]);
    }
}

// Goes over a warp's slices of SELL-C-sigma lists (C = 32): lane l of slice k has four entries at a time, those from 32
// (start[k] + i) + 4 l on, i a multiple of 4. Of the first `shared` slices all lanes have a part of one list, else each
// lane has a list of its own, or none (list >= lists).
//   load(ring, at)          starts to copy four entries
//   fetch(ring, ahead)      starts to load what they name, into an Ahead
//   add(ring, ahead, next)  adds what has been fetched; calls next() when it has taken it out of `ahead` and the copy
//   end(list, of_all)       behind a list, of all lanes if `of_all`
// Copies are as far ahead as those of a row, what is fetched one step.
template <typename Ahead, typename Lists, typename Load, typename Fetch, typename Add, typename End>
__device__ __forceinline__ void each_slice(const Lists& lists, Load load, Fetch fetch, Add add, End end) {
    constexpr int step = 4;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % warp_size;
    const int warps = static_cast<int>(blockDim.x) / warp_size;
#pragma unroll 1
    for (int part = thread / warp_size; part < list_parts; part += warps) {
        int slice = lists.part[part];
        const int behind = lists.part[part + 1];
        if (slice >= behind) continue;
        const int last = lists.start[behind];
        int i = lists.start[slice];
        Ring ring;
        const auto copy = [&](int i) {
            if (i < last) load(ring, i * warp_size + step * lane);
            ring.push();
        };
#pragma unroll
        for (int k = 0; k < Ring::depth; ++k) copy(i + k * step);
        Ahead ahead;
        ring.wait();
        fetch(ring, ahead);
#pragma unroll 1
        while (slice < behind) {
            // Where 32 slices end, one in each lane. The first shuffle waits for them, so that those of the loop do not
            // wait for what has been fetched: the machine counts loads in flight in few counters.
            const int ends = __shfl_sync(all_lanes, lists.start[min(slice + 1 + lane, behind)], lane);
            const int many = min(behind - slice, warp_size);
#pragma unroll 1
            for (int n = 0; n < many; ++n, ++slice) {
                const bool of_all = slice < lists.shared;
                const int list = of_all ? slice : lists.shared + (slice - lists.shared) * warp_size + lane;
                const int end_of_slice = __shfl_sync(all_lanes, ends, n);
#pragma unroll 1
                for (; i < end_of_slice; i += step) {
                    add(ring, ahead, [&] {
                        copy(i + Ring::depth * step);
                        ring.wait();
                        if (i + step < last) fetch(ring, ahead);
                    });
                }
                end(list, of_all);
            }
        }
    }
}

// Parts of a workspace are so many floats, so that all of them are aligned.
__host__ __device__ inline int64_t whole(int64_t count) {
    constexpr int64_t unit = 32;
    return (count + unit - 1) / unit * unit;
}

// Shared memory of the sums over a block.
struct Sums {
    static constexpr int most = 3;
    double part[max_threads / warp_size][most];
    double total[most];
    float top_part[max_threads / warp_size];
    float top;
};

// Replaces each value by its sum over the threads of the block.
template <int N>
__device__ void block_sum(double (&values)[N], Sums& shared) {
    static_assert(N <= Sums::most, "room for the sums");
    const int thread = static_cast<int>(threadIdx.x), lane = thread % warp_size, warp = thread / warp_size;
    const int warps = static_cast<int>(blockDim.x) / warp_size;
#pragma unroll
    for (int k = 0; k < N; ++k) {
        for (int step = warp_size / 2; step > 0; step /= 2) values[k] += __shfl_xor_sync(all_lanes, values[k], step);
        if (lane == 0) shared.part[warp][k] = values[k];
    }
    __syncthreads();  // the parts are there, and everybody has read the totals of the sum before
    if (warp == 0) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
            double x = lane < warps ? shared.part[lane][k] : 0.0;
            for (int step = warp_size / 2; step > 0; step /= 2) x += __shfl_xor_sync(all_lanes, x, step);
            if (lane == 0) shared.total[k] = x;
        }
    }
    __syncthreads();  // the totals are there, and the parts may be overwritten
#pragma unroll
    for (int k = 0; k < N; ++k) values[k] = shared.total[k];
}

// The largest value over the threads of the block.
__device__ inline float block_max(float x, Sums& shared) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % warp_size, warp = thread / warp_size;
    const int warps = static_cast<int>(blockDim.x) / warp_size;
    for (int step = warp_size / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(all_lanes, x, step));
    if (lane == 0) shared.top_part[warp] = x;
    __syncthreads();  // as in block_sum
    if (warp == 0) {
        float top = lane < warps ? shared.top_part[lane] : x;
        for (int step = warp_size / 2; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(all_lanes, top, step));
        if (lane == 0) shared.top = top;
    }
    __syncthreads();  // as in block_sum
    return shared.top;
}

// What logits x of 16 bits may be multiplied by where `x scale` less `top scale`, rounded, is an exponent of 2: a power
// of two beyond 2^29, where rounding would exceed all exponents. Next to such a logit no other has mass by either
// factor.
__device__ inline float scale_beside(float top, float scale) {
    return fabsf(top * scale) > 0x1p29f ? __uint_as_float(__float_as_uint(scale) & 0x7f800000u) : scale;
}

// exp(x). Not `precise`, for logits that have 8 or 11 bits themselves: one instruction and a product are exact enough
// (a relative error of about |x| 1e-7).
__device__ inline float exponential(float x, bool precise) { return precise ? expf(x) : fast_exp2(x * log2_e); }

// The same for several, asking only once.
template <int N>
__device__ void exponentials(float (&x)[N], bool precise) {
    if (precise) {
#pragma unroll
        for (int k = 0; k < N; ++k) x[k] = expf(x[k]);
    } else {
#pragma unroll
        for (int k = 0; k < N; ++k) x[k] = fast_exp2(x[k] * log2_e);
    }
}

// exp(x factor), and of several: one product for both the factor and the change of base.
__device__ inline float scaled_exp(float x, float factor, bool precise) {
    return precise ? expf(x * factor) : fast_exp2(x * (factor * log2_e));
}
template <int N>
__device__ void scaled_exp(const float (&x)[N], float factor, bool precise, float (&e)[N]) {
    if (precise) {
#pragma unroll
        for (int k = 0; k < N; ++k) e[k] = expf(x[k] * factor);
    } else {
        const float scale = factor * log2_e;
#pragma unroll
        for (int k = 0; k < N; ++k) e[k] = fast_exp2(x[k] * scale);
    }
}

// log(x) and x / y, likewise. No subnormal numbers if not `precise`, and y at most 2^126.
__device__ inline float logarithm(float x, bool precise) { return precise ? logf(x) : fast_log2(x) * ln_2; }
__device__ inline float quotient(float x, float y, bool precise) { return precise ? x / y : fast_divide(x, y); }

// exp((x - top) / temperature) for x of at least `lowest`.
struct Exponential {
    bool precise;
    float top, lowest, inverse_temperature;

    __device__ float exponent(float x) const { return (at_least(x, lowest) - top) * inverse_temperature; }
    __device__ float operator()(float x) const {
        return scaled_exp(at_least(x, lowest) - top, inverse_temperature, precise);
    }
    // Of several, asking only once how.
    template <int N>
    __device__ void operator()(const float (&x)[N], float (&e)[N]) const {
        float relative[N];
        subtract(x, relative);
        scaled_exp(relative, inverse_temperature, precise, e);
    }
    // log softmax, with the logarithm of the exponentials' sum
    __device__ float log_share(float x, float log_total) const {
        return fmaf(at_least(x, lowest) - top, inverse_temperature, -log_total);
    }
    template <int N>
    __device__ void log_shares(const float (&x)[N], float log_total, float (&log_share)[N]) const {
        float relative[N];
        subtract(x, relative);
#pragma unroll
        for (int k = 0; k < N; ++k) log_share[k] = fmaf(relative[k], inverse_temperature, -log_total);
    }
    // Takes another top; returns the factor of exponentials so far.
    __device__ float move(float new_top) {
        const float step = top - new_top;
        top = new_top;
        return scaled_exp(step, inverse_temperature, precise);
    }

  private:
    template <int N>
    __device__ void subtract(const float (&x)[N], float (&relative)[N]) const {
#pragma unroll
        for (int k = 0; k < N; ++k) relative[k] = at_least(x[k], lowest) - top;
    }
};

// Maximum of a row, and sums of its exponentials relative to it.
struct Statistics {
    Exponential exp;
    double total;     // sum of exp
    double weighted;  // sum of weight * exp

    __device__ double log_total() const { return log(total); }
    // log softmax of an element
    __device__ double log_share(float x) const {
        const double relative = static_cast<double>(at_least(x, exp.lowest)) - static_cast<double>(exp.top);
        return relative * static_cast<double>(exp.inverse_temperature) - log_total();
    }
};

struct Unweighted {
    template <int N>
    __device__ void operator()(int, float (&)[N]) const {}
};

// One pass over (the chosen elements of) a row: the sums are rescaled whenever a thread meets a larger logit.
// weights(i, w) fills w[N] for the elements from i on.
template <typename R, typename Weights>
__device__ Statistics statistics(const R& row, const int32_t* chosen, int size, float lowest, float temperature,
                                 Sums& shared, const Weights& weights) {
    constexpr bool has_weights = !std::is_same_v<Weights, Unweighted>;
    Exponential exp{row.precise(), lowest, lowest, 1.0f / temperature};
    float total = 0.0f, weighted = 0.0f;
    each_column(row, chosen, size, [&](int i, const auto& x) {
        constexpr int N = sizeof(x) / sizeof(float);
        float top = exp.top;
#pragma unroll
        for (int k = 0; k < N; ++k) top = fmaxf(top, x[k]);
        if (top > exp.top) {
            const float shrink = exp.move(top);
            total *= shrink;
            weighted *= shrink;
        }
        float w[N], e[N];
        weights(i, w);
        exp(x, e);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            total += e[k];
            if constexpr (has_weights) weighted = fmaf(e[k], w[k], weighted);
        }
    });
    const auto shrink = static_cast<double>(exp.move(block_max(exp.top, shared)));
    double sums[2] = {static_cast<double>(total) * shrink, static_cast<double>(weighted) * shrink};
    block_sum(sums, shared);
    return {exp, sums[0], sums[1]};
}

// Of a whole row.
template <typename R>
__device__ Statistics row_statistics(const R& row, int size, float lowest, float temperature, Sums& shared) {
    return statistics(row, nullptr, size, lowest, temperature, shared, Unweighted{});
}

// The cross-entropy's part of a row's gradient: scale * (softmax - onehot).
struct LabelTerm {
    Exponential exp;
    int label = -1;  // none
    float scale = 0.0f, weight = 0.0f;

    __device__ float operator()(int i, float x) const {
        if (label < 0) return 0.0f;
        return fmaf(exp(x), weight, i == label ? -scale : 0.0f);
    }
    // Adds those of the elements x from i on, asking only once.
    template <int N>
    __device__ void add(int i, const float (&x)[N], float (&g)[N]) const {
        if (label < 0) return;
        float e[N];
        exp(x, e);
        if (label < i || label >= i + N) {
#pragma unroll
            for (int k = 0; k < N; ++k) g[k] += e[k] * weight;
        } else {
#pragma unroll
            for (int k = 0; k < N; ++k) g[k] += fmaf(e[k], weight, i + k == label ? -scale : 0.0f);
        }
    }
};

// The term of row r, z, and its loss. `one`: statistics of the whole row if they are `known`, which they are at
// temperature 1; by value, since an object that a pointer may name is not kept in registers.
template <typename R>
__device__ LabelTerm label_term(const Labels& labels, int64_t r, const R& z, int size, float lowest, Sums& shared,
                                bool known = false, Statistics one = {}) {
    LabelTerm term;
    term.exp.precise = z.precise();
    if (labels.ids == nullptr) return term;
    const int64_t id = labels.ids[r];
    if (id < 0 || id >= size) {
        if (threadIdx.x == 0) labels.losses[r] = id == -100 ? 0.0f : nanf("");
        return term;
    }
    if (!known) one = row_statistics(z, size, lowest, 1.0f, shared);
    if (threadIdx.x == 0) labels.losses[r] = static_cast<float>(-one.log_share(z[static_cast<int>(id)]));
    term.label = static_cast<int>(id);
    term.scale = static_cast<float>(*labels.scale);
    term.weight = static_cast<float>(*labels.scale / one.total);
    term.exp = one.exp;
    return term;
}

}  // namespace xtoken::cuda
