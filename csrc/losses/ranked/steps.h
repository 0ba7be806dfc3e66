// A row of 16-bit logits as a step function: its probabilities in descending order, without sorting them. For kernels.
//
// Logits of 16 bits take few values. One pass counts them by their bits; what follows works on the values that occur,
// the steps. All that equal logits share is a property of a step, the gradient too.
#pragma once

#include "cpu/rows.h"
#include "losses/ranked/params.h"

namespace xtoken::cpu::XTOKEN_LEVEL {

constexpr int32_t sign_bit = 0x8000;

// The bits of infinity; above them are those that are no numbers.
constexpr int32_t infinity_bits(const BFloat16*) { return 0x7F80; }
constexpr int32_t infinity_bits(const Float16*) { return 0x7C00; }

// In descending order; arrays of values have room for whole vectors.
template <typename T>
struct Steps {
    T* logit;      // [count]
    float* size;   // [count] how many logits have it
    float* value;  // [count] probability, equal for logits that floats do not tell apart; [count + 1] with a 0
    int32_t* end;  // [count] the rank behind the last; [count + 1] with one behind all
    int64_t count;
};

// Adds a row's logits to the counts of their bits.
template <typename T>
inline void count_values(const T* z, int64_t n, int32_t* counts) {
    constexpr int64_t line = 64 / sizeof(T);
    const int64_t whole = n / line * line;
    for (int64_t i = 0; i < whole; i += line) {
        prefetch(z + i + ahead);
        for (int64_t j = i; j < i + line; j += 4) {
            uint64_t four;
            memcpy(&four, z + j, sizeof(four));
            ++counts[four & 0xFFFF];
            ++counts[four >> 16 & 0xFFFF];
            ++counts[four >> 32 & 0xFFFF];
            ++counts[four >> 48];
        }
    }
    for (int64_t i = whole; i < n; ++i) ++counts[z[i].bits];
}

constexpr int32_t count_block = 16;

inline bool is_empty(const int32_t* block) {
    uint64_t words[count_block / 2], any = 0;
    memcpy(words, block, sizeof(words));
    for (const uint64_t word : words) any |= word;
    return any == 0;
}

// Lists the values that occur, with their sizes as `end`, and makes the counts zeros. False if one of them is no number
// or infinite, but for the negative.
template <typename T>
inline bool list_values(int32_t* counts, Steps<T>& steps) {
    const int32_t infinity = infinity_bits(static_cast<const T*>(nullptr));
    int32_t strange = 0;
    for (int32_t i = infinity; i < sign_bit; ++i) strange |= counts[i];
    for (int32_t i = (sign_bit | infinity) + 1; i < value_counts; ++i) strange |= counts[i];
    if (strange != 0) {
        memset(counts, 0, value_counts * sizeof(int32_t));
        return false;
    }
    int64_t count = 0;
    const auto list = [&](int32_t bits) {
        steps.logit[count].bits = static_cast<uint16_t>(bits);
        steps.end[count] = counts[bits];
        count += counts[bits] != 0;
    };
    for (int32_t begin = infinity - count_block; begin >= 0; begin -= count_block) {
        if (is_empty(counts + begin)) continue;
        for (int32_t i = begin + count_block - 1; i >= begin; --i) list(i);
        memset(counts + begin, 0, count_block * sizeof(int32_t));
    }
    for (int32_t begin = sign_bit; begin <= (sign_bit | infinity); begin += count_block) {
        if (is_empty(counts + begin)) continue;
        for (int32_t i = begin; i < begin + count_block; ++i) list(i);
        memset(counts + begin, 0, count_block * sizeof(int32_t));
    }
    steps.count = count;
    return true;
}

// Makes probabilities of the values, and ranks of the sizes.
template <typename T>
inline void find_probabilities(Steps<T>& steps, float lowest, double temperature) {
    const int64_t n = steps.count;
    const float top = at_least(widened(steps.logit[0]), lowest);
    const Exponential exp = Exponential::around(top, lowest, temperature);
    for (int64_t i = 0; i < n; i += lanes) store(steps.value + i, exp(load(steps.logit + i)));
    // Rounding must not make them ascend, and what floats do not tell apart is equal.
    float least = 1.0f;
    int32_t rank = 0;
    for (int64_t i = 0; i < n; ++i) {
        least = steps.value[i] < least ? steps.value[i] : least;
        steps.value[i] = least;
        steps.size[i] = static_cast<float>(steps.end[i]);
        steps.end[i] = rank += steps.end[i];
    }
    DoubleSum total;
    const Floats zero = broadcast(0.0f);
    for (int64_t i = 0; i < n; i += lanes) {
        total.add(select(first(n - i), load(steps.value + i) * load(steps.size + i), zero));
    }
    const Floats inverse = broadcast(static_cast<float>(1 / total.total()));
    for (int64_t i = 0; i < n; i += lanes) store(steps.value + i, load(steps.value + i) * inverse);
    steps.value[n] = 0.0f;
    steps.end[n] = INT32_MAX;
}

// The sum of |P_r - Q_r| over the ranks r below `ranks`, the shorter side padded with zeros. sign[j] receives the sum
// of the signs of P_r - Q_r at the ranks of p's step j and of those before it.
template <typename S, typename T>
inline double step_l1(const Steps<S>& p, const Steps<T>& q, int32_t ranks, int32_t* sign) {
    double loss = 0;
    int32_t signs = 0;
    int64_t i = 0, j = 0;
    for (int32_t rank = 0; rank < ranks;) {
        const int32_t p_end = p.end[i], q_end = q.end[j];
        int32_t end = p_end < q_end ? p_end : q_end;
        end = end < ranks ? end : ranks;
        const float difference = p.value[i] - q.value[j];
        signs += ((difference > 0.0f) - (difference < 0.0f)) * (end - rank);
        loss += static_cast<double>(fabsf(difference)) * (end - rank);
        sign[i] = signs;
        i += p_end == end;
        j += q_end == end;
        rank = end;
    }
    for (; i < p.count; ++i) sign[i] = signs;
    return loss;
}

// The mean of the signs at the ranks of each step; steps of equal probability share theirs.
template <typename T>
inline void find_slopes(const Steps<T>& p, const int32_t* sign, float* slope) {
    int32_t rank = 0, signs = 0;
    for (int64_t begin = 0, end; begin < p.count; begin = end) {
        for (end = begin + 1; end < p.count && p.value[end] == p.value[begin];) ++end;
        const float shared = static_cast<float>(sign[end - 1] - signs) / static_cast<float>(p.end[end - 1] - rank);
        for (int64_t i = begin; i < end; ++i) slope[i] = shared;
        rank = p.end[end - 1];
        signs = sign[end - 1];
    }
}

}  // namespace xtoken::cpu::XTOKEN_LEVEL
