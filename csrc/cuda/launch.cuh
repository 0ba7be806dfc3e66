// Launching a kernel, and its errors.
#pragma once

#include "core/error.h"
#include "cuda/elements.cuh"
#include "launch/arguments.h"

namespace xtoken::cuda {

// What a block of this device may have, static and dynamic, beside as many others as it is to share a multiprocessor
// with.
inline size_t shared_memory_of_a_block() {
    constexpr size_t reserved = 1 << 10;  // of a block, by CUDA
    int device = 0, bytes = 48 << 10;
    if (cudaGetDevice(&device) == cudaSuccess) {
        cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    return (static_cast<size_t>(bytes) + reserved) / resident_blocks - reserved;
}

inline void check(const char* what, cudaError_t status) {
    if (status != cudaSuccess) {
        throw Error(Error::Kind::runtime, std::string(what) + ": " + cudaGetErrorString(status));
    }
}

// Blocks for so many items, on the caller's stream; nothing is launched for none. `shared_bytes`: dynamic ones.
template <typename... Parameters, typename... Arguments>
void launch_shared(const char* what, void (*kernel)(Parameters...), size_t shared_bytes, const Launch& shape,
                   int64_t items, const Arguments&... arguments) {
    if (shape.threads < 32 || shape.threads > max_threads || shape.threads % 32 != 0 || shape.blocks < 1) {
        value_error("launch: expected at least one block of a multiple of 32 threads up to ", max_threads, ", got ",
                    shape.blocks, " of ", shape.threads);
    }
    if (items == 0) return;
    const auto blocks = static_cast<unsigned>(items < shape.blocks ? items : shape.blocks);
    // more than the default has to be asked for
    if (shared_bytes > 48 << 10) {
        check(what, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
    }
    check(what, launch(kernel, dim3(blocks), dim3(static_cast<unsigned>(shape.threads)), shared_bytes,
                       static_cast<cudaStream_t>(shape.stream), arguments...));
}

// `slots`: of the kernel's Ring.
template <typename... Parameters, typename... Arguments>
void launch_items(const char* what, void (*kernel)(Parameters...), int slots, const Launch& shape, int64_t items,
                  const Arguments&... arguments) {
    launch_shared(what, kernel, Ring::bytes(slots), shape, items, arguments...);
}

}  // namespace xtoken::cuda
