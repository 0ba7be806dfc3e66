// L1 between two descending-sorted lists of probabilities, and its gradient, without sorting them. For kernels.
#pragma once

#include "cpu/simd.h"

namespace xtoken::cpu::XTOKEN_LEVEL {

// The sum over ranks r < count of |P_r - Q_r| needs only the sign at each rank. Values are counted in bins by their
// leading bits. A bin's student values hold the ranks [a, a + n), its teacher values [b, b + m). If these ranges do not
// meet, every student value of the bin is compared with teacher values of other bins, all above or all below: one sign
// for the bin. Only the bins where the ranges meet, or where the ranks end, are sorted.
constexpr int sorted_bins = 4096;
constexpr float sort_bin = 2.0f;  // in place of a sign: the bin has to be sorted

inline int32_t bin_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    bits >>= 18;  // 1.0 is in bin 4064; NaN goes to the last
    return static_cast<int32_t>(bits < sorted_bins ? bits : sorted_bins - 1);
}

struct SortedSide {
    const float* values;  // [size], room for whole vectors
    int64_t size;
    int32_t* bin;      // [size], room for whole vectors: bin of each value
    uint64_t* sorted;  // [size]: bits of a value, then its index; those of bins to sort
    uint64_t* spare;   // [size]
    int32_t count[sorted_bins];
    float sign[sorted_bins];
    int64_t taken;  // elements of `sorted`
};

struct SortedL1 {
    double loss;
    double total;  // sum of sign * P over the student's values
};

inline void count_bins(SortedSide& side) {
    memset(side.count, 0, sizeof(side.count));
    for (int64_t i = 0; i < side.size; ++i) {
        side.bin[i] = bin_of(side.values[i]);
        ++side.count[side.bin[i]];
    }
    for (int64_t i = side.size; i < padded(side.size); ++i) side.bin[i] = 0;
}

// Sign of a bin's ranks [begin, begin + n) against the other side's [other, other + m).
inline float sign_of_bin(int64_t begin, int64_t n, int64_t other, int64_t m, int64_t count) {
    if (n == 0 || begin >= count) return 0.0f;
    if (begin + n > count) return sort_bin;
    if (other + m <= begin) return 1.0f;
    if (other >= begin + n) return -1.0f;
    return sort_bin;
}

// By bits, descending.
inline void sort_descending(SortedSide& side) {
    if (side.taken < 48) {
        for (int64_t i = 1; i < side.taken; ++i) {
            const uint64_t moved = side.sorted[i];
            int64_t j = i;
            for (; j > 0 && side.sorted[j - 1] >> 32 < moved >> 32; --j) side.sorted[j] = side.sorted[j - 1];
            side.sorted[j] = moved;
        }
        return;
    }
    constexpr int digit_bits = 11, digits = 1 << digit_bits;
    int32_t place[digits];
    for (int shift = 32; shift < 64; shift += digit_bits) {
        const auto digit = [shift](uint64_t x) { return digits - 1 - static_cast<int>(x >> shift & (digits - 1)); };
        memset(place, 0, sizeof(place));
        for (int64_t i = 0; i < side.taken; ++i) ++place[digit(side.sorted[i])];
        int32_t before = 0;
        for (int32_t& p : place) {
            const int32_t here = p;
            p = before;
            before += here;
        }
        for (int64_t i = 0; i < side.taken; ++i) side.spare[place[digit(side.sorted[i])]++] = side.sorted[i];
        uint64_t* swapped = side.sorted;
        side.sorted = side.spare;
        side.spare = swapped;
    }
}

// sum of sign * value over the bins with a sign; the others' values are put aside. `out`, if not null, gets the
// products.
inline double apply_signs(SortedSide& side, float* out) {
    DoubleSum total;
    Floats part = broadcast(0.0f);
    side.taken = 0;
    for (int64_t i = 0; i < side.size; i += lanes) {
        const Floats value = load(side.values + i);
        const Floats sign = gather(side.sign, side.bin + i);
        const Mask kept = first(side.size - i);
        const uint32_t aside = bits(equal(sign, broadcast(sort_bin))) & bits(kept);
        Floats product = select(kept, sign * value, broadcast(0.0f));
        if (aside != 0) {
            product = select(from_bits(aside), broadcast(0.0f), product);
            for (int64_t lane = 0; lane < lanes; ++lane) {
                if ((aside >> lane & 1u) == 0) continue;
                uint32_t value_bits;
                memcpy(&value_bits, side.values + i + lane, sizeof(value_bits));
                side.sorted[side.taken++] = static_cast<uint64_t>(value_bits) << 32 | static_cast<uint64_t>(i + lane);
            }
        }
        part += product;
        if (out != nullptr) store(out + i, product);
        if ((i & 127) == 112) {  // often: many equal values would all round the same way
            total.add(part);
            part = broadcast(0.0f);
        }
    }
    total.add(part);
    return total.total();
}

inline float value_of(uint64_t entry) {
    const uint32_t bits = static_cast<uint32_t>(entry >> 32);
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

inline int sign_of(float x) { return (x > 0.0f) - (x < 0.0f); }

// `out` [p.size, room for whole vectors] gets sign * P by index and may be p.values. Equal values of the student get
// the mean of their ranks' signs.
inline SortedL1 sorted_l1(SortedSide& p, SortedSide& q, int64_t count, float* out) {
    count_bins(p);
    count_bins(q);
    int64_t a = 0, b = 0;
    bool any = false;
    for (int bin = sorted_bins - 1; bin >= 0; --bin) {
        const int64_t n = p.count[bin], m = q.count[bin];
        p.sign[bin] = sign_of_bin(a, n, b, m, count);
        q.sign[bin] = sign_of_bin(b, m, a, n, count);
        any = any || p.sign[bin] == sort_bin || q.sign[bin] == sort_bin;
        a += n;
        b += m;
    }
    SortedL1 result{0.0, apply_signs(p, out)};
    result.loss = result.total + apply_signs(q, nullptr);
    if (!any) return result;

    sort_descending(p);
    sort_descending(q);
    const uint64_t *next_p = p.sorted, *next_q = q.sorted;
    a = b = 0;
    for (int bin = sorted_bins - 1; bin >= 0; --bin) {
        const int64_t n = p.count[bin], m = q.count[bin];
        const uint64_t *these_p = next_p, *these_q = next_q;
        if (p.sign[bin] == sort_bin) {
            next_p += n;
            for (int64_t begin = 0, end; begin < n; begin = end) {
                const float value = value_of(these_p[begin]);
                int64_t signs = 0;
                for (end = begin; end < n && these_p[end] >> 32 == these_p[begin] >> 32; ++end) {
                    const int64_t rank = a + end;
                    if (rank >= count) continue;
                    signs += rank < b ? -1 : rank >= b + m ? 1 : sign_of(value - value_of(these_q[rank - b]));
                }
                const float shared = static_cast<float>(static_cast<double>(signs) / static_cast<double>(end - begin));
                for (int64_t i = begin; i < end; ++i) out[these_p[i] & 0xFFFFFFFFu] = shared * value;
                result.total += static_cast<double>(signs) * static_cast<double>(value);
                result.loss += static_cast<double>(signs) * static_cast<double>(value);
            }
        }
        if (q.sign[bin] == sort_bin) {
            next_q += m;
            for (int64_t i = 0; i < m && b + i < count; ++i) {
                const int64_t rank = b + i;
                const float value = value_of(these_q[i]);
                const int sign = rank < a ? -1 : rank >= a + n ? 1 : sign_of(value - value_of(these_p[rank - a]));
                result.loss += static_cast<double>(sign) * static_cast<double>(value);
            }
        }
        a += n;
        b += m;
    }
    return result;
}

}  // namespace xtoken::cpu::XTOKEN_LEVEL
