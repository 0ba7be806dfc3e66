// What a kernel source sees of the emulator: CUDA's types, built-in variables, barriers, shuffles, atomics, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

// Where a call is in the source; barriers are told apart and reported by it.
#define XTOKEN_CALL_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace xtoken::emulator {

struct Launch {
    const void* kernel;
    dim3 grid, block;
    size_t shared_bytes;
    void (*entry)(const void* kernel, const void* arguments);
    const void* arguments;
    size_t arguments_size;
};

// Runs all blocks; throws std::runtime_error with the report if there is anything to report.
cudaError_t run(const Launch& launch);

// The built-in variables. They never change within a thread, so calls may be merged.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) dim3 block_size();
__attribute__((const)) dim3 grid_size();

// Shared memory: the variable with this key (one a declaration) in this block, and the dynamic part.
void* shared_variable(const void* key, const char* name, size_t size, size_t alignment);
void* dynamic_shared();

struct BarrierResult {
    int count, every, any;  // of the predicates
};
BarrierResult block_barrier(int predicate, const char* file, int line);

enum class WarpCall { sync, shuffle, vote, match, reduce };
struct WarpValues {
    unsigned lanes;  // that took part
    unsigned lane;   // the caller
    uint64_t value[32];
};
// Waits for the lanes of the mask and returns the value of each.
WarpValues warp_exchange(WarpCall call, unsigned mask, uint64_t value, const char* file, int line);

// Lane `source` of the exchange; an error if it took no part.
uint64_t value_of_lane(const WarpValues& values, unsigned source, const char* file, int line);

// Marks memory as used atomically by the calling thread; and as read through the read-only path.
void atomic_access(const void* address, size_t size);
void read_only_access(const void* address, size_t size);
void uncounted_copy(void* to, const void* from, size_t size);
void fence();

// Asynchronous copies of the calling thread: to shared memory, there when it has waited for their group.
void start_copy(void* to, const void* from, size_t size);
void commit_copies();
void wait_copies(unsigned pending);
[[noreturn]] void trap(const char* file, int line);

// Results of the functions that are not exact on the device: the correctly rounded one, or as far from it as the
// documented error allows. In mixed mode `argument` alone decides the direction: equal arguments have equal results.
float approximate(double exact, int ulps, float argument);             // units in the last place from correctly rounded
float approximate_within(double exact, double error, float argument);  // away from the exact value

template <typename To, typename From>
To bits(const From& from) {
    static_assert(std::is_trivially_copyable_v<From> && sizeof(From) <= sizeof(uint64_t));
    To to{};
    __builtin_memcpy(&to, &from, sizeof(From) < sizeof(To) ? sizeof(From) : sizeof(To));
    return to;
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, const char* file, int line) {
    const WarpValues values = warp_exchange(WarpCall::shuffle, mask, bits<uint64_t>(value), file, line);
    return bits<T>(value_of_lane(values, source, file, line));
}

__attribute__((const)) inline unsigned lane_index() {
    const uint3 t = thread_index();
    const dim3 b = block_size();
    return (t.x + b.x * (t.y + b.y * t.z)) % 32;
}

// The update of an atomic. Its accesses count as atomic ones only.
template <typename T, typename Update>
T atomic_update(T* address, Update update) {
    static_assert(sizeof(T) <= 16);
    atomic_access(address, sizeof(T));
    T old, next;
    uncounted_copy(&old, address, sizeof(T));
    next = update(old);
    uncounted_copy(address, &next, sizeof(T));
    return old;
}

}  // namespace xtoken::emulator

namespace xtoken::cuda {

template <typename T>
struct SameType {
    using type = T;
};

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   Arguments&&... arguments) {
    using Values = std::tuple<Parameters...>;
    const Values values(std::forward<Arguments>(arguments)...);
    const auto entry = [](const void* function, const void* stored) {
        std::apply(reinterpret_cast<void (*)(Parameters...)>(function), *static_cast<const Values*>(stored));
    };
    return emulator::run(
        {reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, entry, &values, sizeof(values)});
}

// PTX ISA, ex2 and div: 2 units; lg2: 2^-22, absolute around 1 and relative elsewhere. Subnormal numbers are 0.
inline float fast_exp2(float x) {
    const double exact = __builtin_exp2(static_cast<double>(x));
    return exact < 0x1p-126 ? 0.0f : emulator::approximate(exact, 2, x);
}
template <typename T>
T* in_register(T* pointer) {
    return pointer;
}
inline uint32_t in_register(uint32_t value) { return value; }
inline float largest(float x, float y) { return x != x ? x : x < y ? y : x; }
inline float fast_log2(float x) {
    if (__builtin_fabsf(x) < 0x1p-126f) x = 0.0f;
    const double exact = __builtin_log2(static_cast<double>(x));
    return emulator::approximate_within(exact, 0x1p-22 * (x > 0.5f && x < 2.0f ? 1.0 : __builtin_fabs(exact)), x);
}
inline float fast_divide(float x, float y) {
    const float size = __builtin_fabsf(y);
    if (!(size >= 0x1p-126f && size <= 0x1p126f)) return __builtin_nanf("");  // undocumented
    const double exact = static_cast<double>(x) / static_cast<double>(y);
    return __builtin_fabs(exact) < 0x1p-126 ? 0.0f : emulator::approximate(exact, 2, x + y);
}

template <typename T>
T* base(T* pointer) {
    return pointer;
}

// PTX ISA, cp.async.
enum class Keep { usual, briefly, partly };
template <Keep keep>
__attribute__((always_inline)) inline uint16_t load_kept(const uint16_t* from) {
    return *from;
}
template <int bytes, bool in_parts = false, Keep keep = Keep::usual>
__attribute__((always_inline)) inline void copy_async(void* to, const void* from) {
    static_assert(bytes == 4 || bytes == 8 || bytes == 16);
    emulator::start_copy(to, from, bytes);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int pending>
void wait_copies() {
    emulator::wait_copies(pending);
}
template <int N>
__attribute__((always_inline)) inline void read_copied(const void* from, uint32_t (&words)[N]) {
    using Vector = std::conditional_t<N == 4, uint4, std::conditional_t<N == 2, uint2, uint32_t>>;
    static_assert(sizeof(Vector) == sizeof words);
    const Vector raw = *static_cast<const Vector*>(from);
    __builtin_memcpy(words, &raw, sizeof raw);
}

template <typename T>
struct InShared {
    const T* values;
    explicit InShared(const T* values) : values(values) {}
    T operator[](int i) const { return values[i]; }
};

}  // namespace xtoken::cuda

#define XTOKEN_SHARED(name, ...)                                                    \
    static const char name##_key = 0;                                               \
    auto& name = *static_cast<typename xtoken::cuda::SameType<__VA_ARGS__>::type*>( \
        xtoken::emulator::shared_variable(&name##_key, #name, sizeof(__VA_ARGS__), alignof(__VA_ARGS__)))
#define XTOKEN_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(xtoken::emulator::dynamic_shared())

#include "intrinsics.h"
