// What the kernels share: passes of a block over a row, and sums over a block.
//
// Exponentials are of differences to a row's maximum, sums within a thread are of a few hundred floats, and those of
// the threads are added as doubles in a fixed order: results do not depend on anything but the shape of the launch.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/arguments.h"
#include "cuda/platform.cuh"

namespace xtoken::cuda {

constexpr int warp_size = 32;
constexpr unsigned all_lanes = 0xffffffffu;
constexpr float log2_e = 1.4426950408889634f;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16(x); }
__device__ inline void narrow(float x, __half& out) { out = __float2half(x); }

template <typename T>
__device__ T* row_of(const Logits& logits, int64_t r) {
    return static_cast<T*>(logits.data) + r / logits.length * logits.sample_stride +
           r % logits.length * logits.row_stride;
}

// As torch's clamp_min: not a number stays what it is.
__device__ inline float at_least(float x, float lowest) { return x < lowest ? lowest : x; }

// N elements from `values + i`, 16 bytes at a time where i allows it; `values` itself is aligned.
template <int N, typename T>
__device__ void load_lanes(const T* values, int i, T (&out)[N]) {
    static_assert(sizeof(T) == 4, "four to a vector");
    if constexpr (N % 4 == 0) {
        if (i % 4 == 0) {
#pragma unroll
            for (int k = 0; k < N; k += 4) {
                const uint4 raw = *reinterpret_cast<const uint4*>(values + i + k);
                memcpy(&out[k], &raw, sizeof raw);
            }
            return;
        }
    }
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = values[i + k];
}

template <int N>
__device__ void store_lanes(float* values, int i, const float (&x)[N]) {
    if constexpr (N % 4 == 0) {
        if (i % 4 == 0) {
#pragma unroll
            for (int k = 0; k < N; k += 4) {
                *reinterpret_cast<float4*>(values + i + k) = make_float4(x[k], x[k + 1], x[k + 2], x[k + 3]);
            }
            return;
        }
    }
#pragma unroll
    for (int k = 0; k < N; ++k) values[i + k] = x[k];
}

// N elements of a row from i on, in one load where they are a whole aligned vector.
template <typename T, int N>
__device__ void load_elements(const T* row, int i, float (&out)[N]) {
    if constexpr (N == 16 / sizeof(T)) {
        if (reinterpret_cast<uintptr_t>(row + i) % 16 == 0) {
            const uint4 raw = *reinterpret_cast<const uint4*>(row + i);
            T lanes[N];
            memcpy(static_cast<void*>(lanes), &raw, sizeof raw);
#pragma unroll
            for (int k = 0; k < N; ++k) out[k] = widen(lanes[k]);
            return;
        }
    }
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = widen(row[i + k]);
}

template <typename T, int N, typename Body>
__device__ void widened(const uint4& raw, int i, Body& body) {
    T lanes[N];
    memcpy(static_cast<void*>(lanes), &raw, sizeof raw);
    float x[N];
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] = widen(lanes[k]);
    body(i, x);
}

// Shares the elements of a row out among the threads of the block, 16 bytes at a time: body(i, x) with x a float[N],
// N = 16 / sizeof(T), or float[1] at the ends of a row that does not begin or end at such a boundary. Two rows of
// different alignment are shared out differently.
template <typename T, typename Body>
__device__ void each_vector(const T* row, int size, Body body) {
    constexpr int N = 16 / sizeof(T);
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T)) % N;
    const int head = misaligned == 0 ? 0 : min(size, N - misaligned);
    const auto single = [&](int i) {
        const float x[1] = {widen(row[i])};
        body(i, x);
    };
    for (int i = thread; i < head; i += threads) single(i);
    const uint4* vectors = reinterpret_cast<const uint4*>(row + head);
    const int count = (size - head) / N;
    int v = thread;
    for (; v + 3 * threads < count; v += 4 * threads) {  // four loads in flight hide the latency of memory
        uint4 raw[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) raw[k] = vectors[v + k * threads];
#pragma unroll
        for (int k = 0; k < 4; ++k) widened<T, N>(raw[k], head + (v + k * threads) * N, body);
    }
    for (; v < count; v += threads) widened<T, N>(vectors[v], head + v * N, body);
    for (int i = head + count * N + thread; i < size; i += threads) single(i);
}

// The same for chosen elements of a row: body(j, x) with x[0] = row[chosen[j]]. All of the row if `chosen` is null.
template <typename T, typename Body>
__device__ void each_column(const T* row, const int32_t* chosen, int columns, Body body) {
    if (chosen == nullptr) return each_vector(row, columns, body);
#pragma unroll 4
    for (int j = static_cast<int>(threadIdx.x); j < columns; j += static_cast<int>(blockDim.x)) {
        const float x[1] = {widen(row[chosen[j]])};
        body(j, x);
    }
}

// out[i] = body(i, z[i], k) for i < size with k the lane, and zeros up to `width`. `out` may be `z`.
template <typename T, typename Prepare>
__device__ void write_row(const T* z, T* out, int size, int width, Prepare prepare) {
    const bool together = (reinterpret_cast<uintptr_t>(z) - reinterpret_cast<uintptr_t>(out)) % 16 == 0;
    each_vector(z, size, [&](int i, const auto& x) {
        constexpr int N = sizeof(x) / sizeof(float);
        float g[N];
        prepare(i, x, g);
        T result[N];
#pragma unroll
        for (int k = 0; k < N; ++k) narrow(g[k], result[k]);
        if constexpr (N > 1) {
            if (together) {
                uint4 raw;
                memcpy(&raw, result, sizeof raw);
                __stcs(reinterpret_cast<uint4*>(out + i), raw);  // not read again: keeps the rows in L2
                return;
            }
        }
#pragma unroll
        for (int k = 0; k < N; ++k) out[i + k] = result[k];
    });
    T zero;
    narrow(0.0f, zero);
    for (int i = size + static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) out[i] = zero;
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

// exp(x), for values from logits of type T: where those have 8 or 11 bits themselves, one instruction and a product are
// exact enough (a relative error of about |x| 1e-7).
template <typename T>
__device__ float exponential(float x) {
    if constexpr (sizeof(T) == 4) return expf(x);
    return fast_exp2(x * log2_e);
}

// exp((x - top) / temperature) for x of at least `lowest`.
template <typename T>
struct Exponential {
    float top, lowest, inverse_temperature;

    __device__ float operator()(float x) const {
        return exponential<T>((at_least(x, lowest) - top) * inverse_temperature);
    }
};

// Maximum of a row, and sums of its exponentials relative to it.
template <typename T>
struct Statistics {
    Exponential<T> exp;
    double total;     // sum of exp
    double weighted;  // sum of weight * exp

    __device__ double log_total() const { return log(total); }
    // log softmax of an element
    __device__ double log_share(float x) const {
        return static_cast<double>(at_least(x, exp.lowest) - exp.top) * static_cast<double>(exp.inverse_temperature) -
               log_total();
    }
};

struct Unweighted {
    template <int N>
    __device__ void operator()(int, float (&)[N]) const {}
};

// One pass over (the chosen elements of) a row: the sums are rescaled whenever a thread meets a larger logit.
// weights(i, w) fills w[N] for the elements from i on.
template <typename T, typename Weights>
__device__ Statistics<T> statistics(const T* row, const int32_t* chosen, int size, float lowest, float temperature,
                                 Sums& shared, const Weights& weights) {
    constexpr bool has_weights = !std::is_same_v<Weights, Unweighted>;
    const float inverse = 1.0f / temperature;
    float top = lowest, total = 0.0f, weighted = 0.0f;
    each_column(row, chosen, size, [&](int i, const auto& x) {
        constexpr int N = sizeof(x) / sizeof(float);
        float largest = top;
#pragma unroll
        for (int k = 0; k < N; ++k) largest = fmaxf(largest, x[k]);
        if (largest > top) {
            const float shrink = exponential<T>((top - largest) * inverse);
            total *= shrink;
            weighted *= shrink;
            top = largest;
        }
        float w[N];
        weights(i, w);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            const float e = exponential<T>((at_least(x[k], lowest) - top) * inverse);
            total += e;
            if constexpr (has_weights) weighted = fmaf(e, w[k], weighted);
        }
    });
    Statistics<T> result{{block_max(top, shared), lowest, inverse}, 0.0, 0.0};
    const double shrink = static_cast<double>(exponential<T>((top - result.exp.top) * inverse));
    double sums[2] = {static_cast<double>(total) * shrink, static_cast<double>(weighted) * shrink};
    block_sum(sums, shared);
    result.total = sums[0];
    result.weighted = sums[1];
    return result;
}

// The cross-entropy's part of a row's gradient: scale * (softmax - onehot).
template <typename T>
struct LabelTerm {
    int label = -1;  // none
    float scale = 0.0f, weight = 0.0f;
    Exponential<T> exp{};

    __device__ float operator()(int i, float x) const {
        if (label < 0) return 0.0f;
        return fmaf(exp(x), weight, i == label ? -scale : 0.0f);
    }
};

// The term of row r, z, and its loss. `known`: statistics of the whole row at temperature 1, if there are any.
template <typename T>
__device__ LabelTerm<T> label_term(const Labels& labels, int64_t r, const T* z, int size, float lowest,
                                typename SameType<const Statistics<T>*>::type known, Sums& shared) {
    LabelTerm<T> term;
    if (labels.ids == nullptr) return term;
    const int64_t id = labels.ids[r];
    if (id < 0 || id >= size) {
        if (threadIdx.x == 0) labels.losses[r] = id == -100 ? 0.0f : nanf("");
        return term;
    }
    const Statistics<T> one =
        known != nullptr ? *known : statistics(z, nullptr, size, lowest, 1.0f, shared, Unweighted{});
    if (threadIdx.x == 0) labels.losses[r] = static_cast<float>(-one.log_share(widen(z[id])));
    term.label = static_cast<int>(id);
    term.scale = static_cast<float>(*labels.scale);
    term.weight = static_cast<float>(*labels.scale / one.total);
    term.exp = one.exp;
    return term;
}

// Calls body with a null pointer to the type of the elements.
template <typename Body>
void typed(Element element, Body body) {
    switch (element) {
        case Element::float32:
            return body(static_cast<const float*>(nullptr));
        case Element::bfloat16:
            return body(static_cast<const __nv_bfloat16*>(nullptr));
        case Element::float16:
            return body(static_cast<const __half*>(nullptr));
    }
}

}  // namespace xtoken::cuda
