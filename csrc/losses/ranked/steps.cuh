// A row of 16-bit logits as a step function: its probabilities in descending order, without sorting them.
//
// Logits of 16 bits take few values. One pass counts them in bins, a bin for each value; what follows works on the
// bins that are not empty, the steps. Equal logits are one step, so that what they share is a property of it.
#pragma once

#include "cuda/rows.cuh"

namespace xtoken::cuda {

constexpr float vanished = 104.0f;  // exp(-vanished) is 0 as a float

// The bits of x >= 0 in type T, in which they ascend as x does.
template <typename T>
__host__ __device__ int magnitude(float x) {
    if constexpr (std::is_same_v<T, __half>) {
        const __half half = __float2half_rz(x);
        uint16_t bits;
        memcpy(&bits, &half, sizeof bits);
        return bits;
    } else {
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        return static_cast<int>(bits >> 16);
    }
}

template <typename T>
__device__ float of_magnitude(int bits) {
    if constexpr (std::is_same_v<T, __half>) {
        const auto word = static_cast<uint16_t>(bits);
        __half half;
        memcpy(static_cast<void*>(&half), &word, sizeof word);
        return __half2float(half);
    } else {
        return __uint_as_float(static_cast<uint32_t>(bits) << 16);
    }
}

// Which bin a logit is counted in. A bin holds one value, or all that are so near to 0 (on one side) that probabilities
// as floats do not tell them apart. The values above 0 come first, then those below, each side by magnitude. The lowest
// bin also has all that is less, and has no gradient.
//
// The usual bins reach to 128 (temperatures, if that is more) on both sides of 0. A row with a larger logit, or without
// one that makes the lowest bin vanish, takes as many bins from its maximum downwards, and they reach as far as
// probabilities do: of all intervals of 104 temperatures the one around 0 has the most values.
template <typename T>
class Bins {
  public:
    __host__ __device__ Bins(float temperature, float lowest)
        : near_zero_(magnitude<T>(fminf(temperature * 0x1p-26f, -lowest))),
          below_lowest_(magnitude<T>(-lowest) + 1),
          half_(magnitude<T>(128.0f * fmaxf(temperature, 1.0f)) - near_zero_ + 1) {}

    __host__ __device__ int size() const { return 2 * half_; }
    __device__ void be_usual() { begin_at(near_zero_ + half_ - 1); }
    __device__ void begin_at(float top) { begin_at(top < 0.0f ? -magnitude<T>(-top) : magnitude<T>(top)); }
    // Whether the usual ones suit a row with this maximum; below the highest, so that they hold no infinity and nothing
    // that is not a number.
    __device__ bool fit(const Exponential& exp) const {
        return exp.top < high_ && (low_ < exp.lowest || (low_ - exp.top) * exp.inverse_temperature <= -vanished);
    }

    __device__ int operator()(float x) const {
        const float inside = fmaxf(fminf(x, high_), low_);  // not a number: the highest
        return magnitude<T>(fmaxf(fabsf(inside), least_)) + (inside < 0.0f ? negative_ : positive_);
    }
    // How many are in use, and the i-th of these by descending value.
    __device__ int count() const { return count_; }
    __device__ int in_order(int i) const { return i < above_ ? above_ - 1 - i : i; }
    __device__ float value(int bin, float lowest) const {
        return bin < above_ ? of_magnitude<T>(bin - positive_) : fmaxf(-of_magnitude<T>(bin - negative_), lowest);
    }

  private:
    // `top`: a magnitude with a sign.
    __device__ void begin_at(int top) {
        const int highest = max(top, near_zero_), begin = max(-top, near_zero_);
        above_ = top < -near_zero_ ? 0 : min(highest - near_zero_ + 1, size());
        positive_ = above_ - 1 - highest;
        negative_ = above_ - begin;
        const int end = min(begin + size() - above_, below_lowest_ + 1);
        count_ = above_ + end - begin;
        high_ = above_ > 0 ? of_magnitude<T>(highest) : -of_magnitude<T>(begin);
        low_ = end > begin ? -of_magnitude<T>(end - 1) : of_magnitude<T>(-positive_);
        least_ = of_magnitude<T>(near_zero_);
    }

    int near_zero_, below_lowest_, half_;
    int above_ = 0, count_ = 0;        // bins for values above 0, and all
    int positive_ = 0, negative_ = 0;  // bin - magnitude on each side
    float high_ = 0.0f, low_ = 0.0f, least_ = 0.0f;
};

// The steps of a row in descending order: the ranks from start[j] to below start[j + 1] have the probability value[j].
struct Steps {
    float* value;    // [count], in memory for as many as there are bins
    int32_t* start;  // [count + 1]
    int32_t* bin;    // [count]
    int32_t count, total;

    // Words of memory for the steps of so many bins.
    static __host__ __device__ int64_t words(int bins) { return 3 * static_cast<int64_t>(bins) + 1; }
    __device__ Steps(float* memory, int bins)
        : value(memory),
          start(reinterpret_cast<int32_t*>(memory + bins)),
          bin(reinterpret_cast<int32_t*>(memory + 2 * static_cast<int64_t>(bins) + 1)),
          count(0),
          total(0) {}
};

// The sum of a thread's exponentials, relative to the largest logit that it has met.
class RunningSum {
  public:
    __device__ RunningSum(bool precise, float lowest, float temperature)
        : exp_{precise, lowest, lowest, 1.0f / temperature} {}

    // Of elements that occur `times` times.
    template <int N>
    __device__ void add(const float (&x)[N], float times = 1.0f) {
        float top = exp_.top, e[N];
#pragma unroll
        for (int k = 0; k < N; ++k) top = fmaxf(top, x[k]);
        if (top > exp_.top) total_ *= exp_.move(top);
        exp_(x, e);
#pragma unroll
        for (int k = 0; k < N; ++k) total_ = fmaf(e[k], times, total_);
    }

    __device__ Statistics over_block(Sums& shared) {
        const auto shrink = static_cast<double>(exp_.move(block_max(exp_.top, shared)));
        double sums[1] = {static_cast<double>(total_) * shrink};
        block_sum(sums, shared);
        return {exp_, sums[0], 0.0};
    }

  private:
    Exponential exp_;
    float total_ = 0.0f;
};

// Shared memory of a scan over the bins.
struct BinSums {
    int32_t kinds[max_threads / warp_size], tokens[max_threads / warp_size];
};

__device__ inline void clear(int32_t* counts, int size) {
    for (int i = static_cast<int>(threadIdx.x); i < size; i += static_cast<int>(blockDim.x)) counts[i] = 0;
    __syncthreads();  // before somebody counts
}

// Counts a row's elements in bins, but those with a bit in `skipped` (null: none), and finds the statistics of all: of
// the bins if they have all, else in the same pass. `ahead`: the ring has room for the bits.
template <bool counts_are_shared, bool ahead, typename T>
__device__ Statistics count_elements(const Row<T>& row, int size, const int32_t* skipped, float lowest,
                                     float temperature, Bins<T>& bins, int32_t* counts, Sums& shared) {
    const auto count = [&](const auto& x, unsigned skip) {
        constexpr int N = sizeof(x) / sizeof(float);
        int bin[N];
#pragma unroll
        for (int k = 0; k < N; ++k) bin[k] = bins(x[k]);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            if ((skip >> k & 1) == 0) increment<counts_are_shared>(counts + bin[k]);
        }
    };
    // body(x, bits)
    const auto each = [&](auto body) {
        if (skipped == nullptr) {
            each_vector(row, size, [&](int, const auto& x) { body(x, 0); });
        } else {
            each_pair(row, BitRow<ahead>{skipped}, size,
                      [&](int, const auto& x, const auto& skip) { body(x, skip.bits); });
        }
    };
    bins.be_usual();
    clear(counts, bins.count());
    if (skipped == nullptr) {
        each(count);
        __syncthreads();  // the counts are there
        RunningSum sum(row.precise(), lowest, temperature);
        for (int bin = static_cast<int>(threadIdx.x); bin < bins.count(); bin += static_cast<int>(blockDim.x)) {
            if (counts[bin] != 0) sum.add({bins.value(bin, lowest)}, static_cast<float>(counts[bin]));
        }
        const Statistics one = sum.over_block(shared);
        if (bins.fit(one.exp)) return one;
        clear(counts, bins.count());
    }
    RunningSum sum(row.precise(), lowest, temperature);
    each([&](const auto& x, unsigned skip) {
        sum.add(x);
        count(x, skip);
    });
    const Statistics one = sum.over_block(shared);  // its barriers are behind the counts, too
    if (!bins.fit(one.exp)) {
        bins.begin_at(one.exp.top);
        clear(counts, bins.count());
        each(count);
        __syncthreads();  // the counts are there
    }
    return one;
}

// The bins that are not empty, as steps. Each warp goes twice over a range of bins: to sum them, and to list them.
template <typename T>
__device__ void list_steps(const Bins<T>& bins, const int32_t* counts, const Statistics& one, Steps& steps,
                           BinSums& shared) {
    const int lane = static_cast<int>(threadIdx.x) % warp_size, warp = static_cast<int>(threadIdx.x) / warp_size;
    const int warps = static_cast<int>(blockDim.x) / warp_size, size = bins.count();
    const int range = (size + warps * warp_size - 1) / (warps * warp_size) * warp_size;
    const int begin = warp * range, end = min(begin + range, size);  // counted from the top
    int kinds = 0, tokens = 0;
    for (int i = begin + lane; i < end; i += warp_size) {
        const int n = counts[bins.in_order(i)];
        kinds += n != 0;
        tokens += n;
    }
    kinds = __reduce_add_sync(all_lanes, kinds);
    tokens = __reduce_add_sync(all_lanes, tokens);
    if (lane == 0) {
        shared.kinds[warp] = kinds;
        shared.tokens[warp] = tokens;
    }
    __syncthreads();  // the sums of all warps are there
    int place = 0, rank = 0;
    for (int w = 0; w < warps; ++w) {
        if (w == warp) {
            place = steps.count;
            rank = steps.total;
        }
        steps.count += shared.kinds[w];
        steps.total += shared.tokens[w];
    }
    const float inverse = static_cast<float>(1.0 / one.total);
    for (int i = begin; i < end; i += warp_size) {
        const int bin = bins.in_order(i + lane), n = i + lane < end ? counts[bin] : 0;
        const unsigned listed = __ballot_sync(all_lanes, n != 0);
        int up_to_here = n;
        for (int step = 1; step < warp_size; step *= 2) {
            const int other = __shfl_up_sync(all_lanes, up_to_here, step);
            if (lane >= step) up_to_here += other;
        }
        if (n != 0) {
            const int j = place + __popc(listed & ((1u << lane) - 1));
            steps.value[j] = expf(one.exp.log_share(bins.value(bin, one.exp.lowest), 0.0f)) * inverse;
            steps.start[j] = rank + up_to_here - n;
            steps.bin[j] = bin;
        }
        place += __popc(listed);
        rank += __shfl_sync(all_lanes, up_to_here, warp_size - 1);
    }
    if (threadIdx.x == 0) steps.start[steps.count] = steps.total;
    __syncthreads();  // the steps are there, and the counts may be overwritten
}

// The sum over a step's ranks below `ranks` of the sign of its probability less the other side's, which is 0 after its
// last.
__device__ inline int sum_of_signs(const Steps& steps, int j, const Steps& other, int ranks) {
    const int begin = steps.start[j], end = min(steps.start[j + 1], ranks);
    if (begin >= end) return 0;
    const float value = steps.value[j];
    int low = 0;
    for (int high = other.count; low < high;) {
        const int middle = (low + high) / 2;
        if (other.value[middle] > value) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    const int larger = other.start[low];  // the ranks before
    while (low < other.count && other.value[low] == value) ++low;
    const int smaller = value == 0.0f ? end : other.start[low];  // and the ranks from here on
    return max(0, end - max(begin, smaller)) - max(0, min(end, larger) - begin);
}

}  // namespace xtoken::cuda
