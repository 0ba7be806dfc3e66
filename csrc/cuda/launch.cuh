// Launching a kernel, and its errors.
#pragma once

#include "core/error.h"
#include "cuda/platform.cuh"
#include "launch/arguments.h"

namespace xtoken::cuda {

// Blocks for so many items, on the caller's stream; nothing is launched for none.
template <typename... Parameters, typename... Arguments>
void launch_items(const char* what, void (*kernel)(Parameters...), const Launch& shape, int64_t items,
                  const Arguments&... arguments) {
    if (shape.threads < 32 || shape.threads > max_threads || shape.threads % 32 != 0 || shape.blocks < 1) {
        value_error("launch: expected at least one block of a multiple of 32 threads up to ", max_threads, ", got ",
                    shape.blocks, " of ", shape.threads);
    }
    if (items == 0) return;
    const auto blocks = static_cast<unsigned>(items < shape.blocks ? items : shape.blocks);
    const cudaError_t status = launch(kernel, dim3(blocks), dim3(static_cast<unsigned>(shape.threads)), 0,
                                      static_cast<cudaStream_t>(shape.stream), arguments...);
    if (status != cudaSuccess) {
        throw Error(Error::Kind::runtime, std::string(what) + ": " + cudaGetErrorString(status));
    }
}

}  // namespace xtoken::cuda
