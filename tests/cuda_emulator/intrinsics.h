// Those of CUDA's built-in functions that the kernels use, in terms of emulator.h.
#pragma once

#include <vector_functions.h>

#include <algorithm>
#include <cmath>

#include "emulator.h"

#define threadIdx (xtoken::emulator::thread_index())
#define blockIdx (xtoken::emulator::block_index())
#define blockDim (xtoken::emulator::block_size())
#define gridDim (xtoken::emulator::grid_size())
constexpr int warpSize = 32;

// Barriers and fences.
inline void __syncthreads(XTOKEN_CALL_SITE) { xtoken::emulator::block_barrier(0, file, line); }
inline int __syncthreads_count(int predicate, XTOKEN_CALL_SITE) {
    return xtoken::emulator::block_barrier(predicate, file, line).count;
}
inline int __syncthreads_and(int predicate, XTOKEN_CALL_SITE) {
    return xtoken::emulator::block_barrier(predicate, file, line).every;
}
inline int __syncthreads_or(int predicate, XTOKEN_CALL_SITE) {
    return xtoken::emulator::block_barrier(predicate, file, line).any;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, XTOKEN_CALL_SITE) {
    xtoken::emulator::warp_exchange(xtoken::emulator::WarpCall::sync, mask, 0, file, line);
}
inline void __threadfence() { xtoken::emulator::fence(); }
inline void __threadfence_block() {}
inline void __trap(XTOKEN_CALL_SITE) { xtoken::emulator::trap(file, line); }

// Shuffles within segments of `width` lanes.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, XTOKEN_CALL_SITE) {
    const unsigned lane = xtoken::emulator::lane_index();
    return xtoken::emulator::shuffle(mask, value, (lane & ~(width - 1u)) | (source & (width - 1u)), file, line);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, XTOKEN_CALL_SITE) {
    const unsigned lane = xtoken::emulator::lane_index();
    const bool inside = (lane & (width - 1u)) >= delta;
    return xtoken::emulator::shuffle(mask, value, inside ? lane - delta : lane, file, line);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, XTOKEN_CALL_SITE) {
    const unsigned lane = xtoken::emulator::lane_index();
    const bool inside = (lane & (width - 1u)) + delta < static_cast<unsigned>(width);
    return xtoken::emulator::shuffle(mask, value, inside ? lane + delta : lane, file, line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, XTOKEN_CALL_SITE) {
    const unsigned lane = xtoken::emulator::lane_index();
    const unsigned source = lane ^ static_cast<unsigned>(lanes);
    const bool inside = source < (lane & ~(width - 1u)) + width;
    return xtoken::emulator::shuffle(mask, value, inside ? source : lane, file, line);
}

// Votes, matches and reductions of a warp.
inline unsigned __ballot_sync(unsigned mask, int predicate, XTOKEN_CALL_SITE) {
    const auto values =
        xtoken::emulator::warp_exchange(xtoken::emulator::WarpCall::vote, mask, predicate != 0, file, line);
    unsigned result = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if ((values.lanes >> lane & 1) && values.value[lane]) result |= 1u << lane;
    }
    return result;
}
inline int __any_sync(unsigned mask, int predicate, XTOKEN_CALL_SITE) {
    return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, XTOKEN_CALL_SITE) {
    return __ballot_sync(mask, !predicate, file, line) == 0;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, XTOKEN_CALL_SITE) {
    const auto values = xtoken::emulator::warp_exchange(xtoken::emulator::WarpCall::match, mask,
                                                        xtoken::emulator::bits<uint64_t>(value), file, line);
    unsigned result = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if ((values.lanes >> lane & 1) && values.value[lane] == values.value[values.lane]) result |= 1u << lane;
    }
    return result;
}
namespace xtoken::emulator {
template <typename T, typename Combine>
T reduce(unsigned mask, T value, Combine combine, const char* file, int line) {
    const WarpValues values = warp_exchange(WarpCall::reduce, mask, bits<uint64_t>(value), file, line);
    T result = value;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if ((values.lanes >> lane & 1) && lane != values.lane) result = combine(result, bits<T>(values.value[lane]));
    }
    return result;
}
}  // namespace xtoken::emulator
#define XTOKEN_WARP_REDUCTION(name, expression)                                                             \
    template <typename T>                                                                                   \
    T name(unsigned mask, T value, XTOKEN_CALL_SITE) {                                                      \
        static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);                               \
        return xtoken::emulator::reduce(mask, value, [](T a, T b) -> T { return expression; }, file, line); \
    }
XTOKEN_WARP_REDUCTION(__reduce_add_sync, a + b)
XTOKEN_WARP_REDUCTION(__reduce_min_sync, a < b ? a : b)
XTOKEN_WARP_REDUCTION(__reduce_max_sync, a < b ? b : a)
XTOKEN_WARP_REDUCTION(__reduce_and_sync, a& b)
XTOKEN_WARP_REDUCTION(__reduce_or_sync, a | b)
XTOKEN_WARP_REDUCTION(__reduce_xor_sync, a ^ b)
#undef XTOKEN_WARP_REDUCTION

// Atomics, for the types that the device has them for.
#define XTOKEN_ATOMIC(name, type, expression)                                                          \
    inline type name(type* address, type value) {                                                      \
        return xtoken::emulator::atomic_update(address, [=](type old) -> type { return expression; }); \
    }
#define XTOKEN_ATOMIC_INTEGER(name, expression)   \
    XTOKEN_ATOMIC(name, int, expression)          \
    XTOKEN_ATOMIC(name, unsigned int, expression) \
    XTOKEN_ATOMIC(name, unsigned long long, expression)
XTOKEN_ATOMIC_INTEGER(atomicAdd, old + value)
XTOKEN_ATOMIC(atomicAdd, float, old + value)
XTOKEN_ATOMIC(atomicAdd, double, old + value)
XTOKEN_ATOMIC(atomicSub, int, old - value)
XTOKEN_ATOMIC(atomicSub, unsigned int, old - value)
XTOKEN_ATOMIC_INTEGER(atomicMin, std::min(old, value))
XTOKEN_ATOMIC_INTEGER(atomicMax, std::max(old, value))
XTOKEN_ATOMIC(atomicMin, long long, std::min(old, value))
XTOKEN_ATOMIC(atomicMax, long long, std::max(old, value))
XTOKEN_ATOMIC_INTEGER(atomicAnd, old& value)
XTOKEN_ATOMIC_INTEGER(atomicOr, old | value)
XTOKEN_ATOMIC_INTEGER(atomicXor, old ^ value)
XTOKEN_ATOMIC_INTEGER(atomicExch, (static_cast<void>(old), value))
XTOKEN_ATOMIC(atomicExch, float, (static_cast<void>(old), value))
XTOKEN_ATOMIC(atomicInc, unsigned int, old >= value ? 0 : old + 1)
#undef XTOKEN_ATOMIC_INTEGER
#undef XTOKEN_ATOMIC
template <typename T>
T atomicCAS(T* address, T expected, T value) {
    static_assert(std::is_integral_v<T> && (sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8));
    return xtoken::emulator::atomic_update(address, [=](T old) { return old == expected ? value : old; });
}

namespace xtoken::cuda {
template <bool is_shared>
void increment(int* counter) {
    atomicAdd(counter, 1);
}
}  // namespace xtoken::cuda

// Loads and stores with cache hints: ordinary accesses here, except that nothing may write what __ldg reads.
template <typename T>
T __ldg(const T* address) {
    xtoken::emulator::read_only_access(address, sizeof(T));
    return *address;
}
#define XTOKEN_LOAD(name)      \
    template <typename T>      \
    T name(const T* address) { \
        return *address;       \
    }
#define XTOKEN_STORE(name)           \
    template <typename T>            \
    void name(T* address, T value) { \
        *address = value;            \
    }
XTOKEN_LOAD(__ldca)
XTOKEN_LOAD(__ldcg)
XTOKEN_LOAD(__ldcs)
XTOKEN_LOAD(__ldcv)
XTOKEN_LOAD(__ldlu)
XTOKEN_STORE(__stwb)
XTOKEN_STORE(__stcg)
XTOKEN_STORE(__stcs)
XTOKEN_STORE(__stwt)
#undef XTOKEN_LOAD
#undef XTOKEN_STORE

// Conversions whose results are often stored at once. g++ emits no check for a store of a class that a function
// returns, so they pass through a variable; emulator.py looks for others.
namespace xtoken::emulator {
template <typename T>
__attribute__((always_inline)) inline T through_variable(T value) {
    return value;
}
}  // namespace xtoken::emulator
#define __float2bfloat16(...) xtoken::emulator::through_variable(__float2bfloat16(__VA_ARGS__))
#define __float2half(...) xtoken::emulator::through_variable(__float2half(__VA_ARGS__))

// Bits.
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline unsigned __brev(unsigned x) {
    unsigned result = 0;
    for (int bit = 0; bit < 32; ++bit) result |= (x >> bit & 1u) << (31 - bit);
    return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int __float_as_int(float x) { return xtoken::emulator::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return xtoken::emulator::bits<unsigned>(x); }
inline float __int_as_float(int x) { return xtoken::emulator::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return xtoken::emulator::bits<float>(x); }

// Arithmetic. Units in the last place by which functions may be off: CUDA C++ Programming Guide, "Mathematical
// Functions", "Standard Functions". (Intrinsic ones, such as __expf, are not used; see platform.cuh.)
namespace xtoken::emulator {
inline float standard_exp(float x) { return approximate(std::exp(static_cast<double>(x)), 2, x); }
inline float standard_log(float x) { return approximate(std::log(static_cast<double>(x)), 1, x); }
}  // namespace xtoken::emulator
#define expf(...) xtoken::emulator::standard_exp(__VA_ARGS__)
#define logf(...) xtoken::emulator::standard_log(__VA_ARGS__)
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __saturatef(float x) { return x > 0.0f ? std::min(x, 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __fma_rn(double x, double y, double z) { return std::fma(x, y, z); }
template <typename T, typename = std::enable_if_t<std::is_integral_v<T>>>
T min(T a, T b) {
    return a < b ? a : b;
}
template <typename T, typename = std::enable_if_t<std::is_integral_v<T>>>
T max(T a, T b) {
    return a < b ? b : a;
}
