// What kernel sources include in place of CUDA's own headers: nvcc's world, or the emulator's (tests/cuda_emulator).
//
// Kernels are plain CUDA C++. Three things are spelled in a way that both compilers take: shared memory and launches
// below, and PTX instructions without an intrinsic, which are functions here.
#pragma once

#ifdef XTOKEN_EMULATED
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

namespace xtoken::cuda {

template <typename T>
struct SameType {
    using type = T;
};

// Calls kernel<<<grid, block, shared_bytes, stream>>>(arguments...).
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
    std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
    return std::apply(
        [&](auto&... value) {
            void* pointers[] = {static_cast<void*>(&value)..., nullptr};
            return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, shared_bytes, stream);
        },
        values);
}

#ifdef __CUDACC__
// 2^x: at most 2 units in the last place off (PTX ISA, ex2); results below 2^-126 are 0.
__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Base-2 logarithm: at most 2^-22 off for x in (0.5, 2), 2^-22 of itself elsewhere (PTX ISA, lg2).
__device__ __forceinline__ float fast_log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// x / y: at most 2 units in the last place off for |y| in [2^-126, 2^126] (PTX ISA, div).
__device__ __forceinline__ float fast_divide(float x, float y) {
    float z;
    asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

// The larger of two numbers; not a number if one of them is not.
__device__ __forceinline__ float largest(float x, float y) {
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

// A pointer to global memory as a value of its own, from which the compiler addresses what is read.
template <typename T>
__device__ __forceinline__ T* base(T* pointer) {
    size_t address;
    asm("cvta.to.global.u64 %0, %1;" : "=l"(address) : "l"(pointer));
    return static_cast<T*>(__cvta_global_to_generic(address));
}

// The same value, which the compiler does not derive anew from its parts at each use.
template <typename T>
__device__ __forceinline__ T* in_register(T* pointer) {
    asm("" : "+l"(pointer));
    return pointer;
}
__device__ __forceinline__ uint32_t in_register(uint32_t value) {
    asm("" : "+r"(value));
    return value;
}

// Asynchronous copies (PTX ISA, cp.async): started one by one, committed as a group, there for the thread that started
// them when it has waited for all but its `pending` last groups. What they fill is read by read_copied, which stays
// between the wait before it and the copy after it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// What is copied stays in L2 as usual, gives way to all else, or a quarter of it stays and the rest gives way.
enum class Keep { usual, briefly, partly };

template <Keep keep>
__device__ __forceinline__ uint64_t policy_of() {
    static_assert(keep != Keep::usual, "which has none");
    uint64_t policy;
    if constexpr (keep == Keep::briefly) {
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    } else {
        asm("createpolicy.fractional.L2::evict_last.L2::evict_first.b64 %0, 0.25;" : "=l"(policy));
    }
    return policy;
}

// An element of 16 bits of global memory that no kernel writes while this one runs.
template <Keep keep>
__device__ __forceinline__ uint16_t load_kept(const uint16_t* from) {
    if constexpr (keep == Keep::usual) {
        return *from;
    } else {
        uint16_t x;
        asm("ld.global.L2::cache_hint.u16 %0, [%1], %2;" : "=h"(x) : "l"(from), "l"(policy_of<keep>()));
        return x;
    }
}

// `bytes` (4, 8 or 16) from global to shared memory, both aligned to as many. `in_parts`: the lanes of a warp leave out
// what its next copy takes.
template <int bytes, bool in_parts = false, Keep keep = Keep::usual>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
    if constexpr (keep != Keep::usual) {
        static_assert(bytes == 16 && !in_parts, "of a row");
        const uint64_t policy = policy_of<keep>();
        asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                     "l"(from), "l"(policy));
    } else if constexpr (bytes == 16 && !in_parts) {  // past L1
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from));
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from), "n"(bytes));
    }
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int pending>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending));
}
__device__ __forceinline__ void read_copied(const void* from, uint32_t (&words)[4]) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(from)));
}
__device__ __forceinline__ void read_copied(const void* from, uint32_t (&words)[2]) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(shared_address(from)));
}
__device__ __forceinline__ void read_copied(const void* from, uint32_t (&words)[1]) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[0]) : "r"(shared_address(from)));
}

// Values of 8 bytes that are known to be in shared memory.
template <typename T>
class InShared {
  public:
    __device__ __forceinline__ explicit InShared(const T* values) : address_(in_register(shared_address(values))) {}
    __device__ __forceinline__ T operator[](int i) const {
        static_assert(sizeof(T) == 8, "two words");
        uint32_t words[2];
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(address_ + i * 8));
        T value;
        memcpy(&value, words, sizeof value);
        return value;
    }

  private:
    uint32_t address_;
};

// ++*counter, atomically.
template <bool is_shared>
__device__ __forceinline__ void increment(int* counter) {
    if constexpr (is_shared) {
        asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(shared_address(counter)) : "memory");
    } else {
        atomicAdd(counter, 1);
    }
}
#endif

}  // namespace xtoken::cuda

// A variable in static shared memory: XTOKEN_SHARED(partial, float[32]);
#define XTOKEN_SHARED(name, ...) __shared__ typename xtoken::cuda::SameType<__VA_ARGS__>::type name

// A pointer to the dynamic shared memory, 16-byte aligned: XTOKEN_DYNAMIC_SHARED(float, scratch);
#define XTOKEN_DYNAMIC_SHARED(type, name)                                         \
    extern __shared__ __align__(16) unsigned char xtoken_dynamic_shared_memory[]; \
    type* const name = reinterpret_cast<type*>(xtoken_dynamic_shared_memory)

#endif
