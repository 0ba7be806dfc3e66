// How blocks share out the chunks of a call: each takes the next one from a queue, so that a block which starts late,
// or shares its multiprocessor with another kernel, takes fewer. A chunk's results do not depend on which block
// computes it.
#pragma once

#include "cuda/launch.cuh"

namespace xtoken::cuda {

constexpr size_t queue_bytes = 16;  // of shared memory that each_chunk takes

// Calls body(k) for this block's chunks, by all threads; between two calls there are barriers. A chunk that does not
// count (its row is -1) has the loss 0.
template <typename Params, typename Body>
__device__ void each_chunk(const Params& params, Body body) {
    XTOKEN_SHARED(next, int64_t);
    if (threadIdx.x == 0) next = static_cast<int64_t>(blockIdx.x) - gridDim.x;
    for (;;) {
        if (threadIdx.x == 0) {
            next = params.queue == nullptr
                       ? next + gridDim.x
                       : static_cast<int64_t>(atomicAdd(reinterpret_cast<unsigned long long*>(params.queue), 1));
        }
        __syncthreads();  // the chunk is known
        if (next >= params.chunks) return;
        if (params.student_rows.start[next] >= 0) {
            body(next);
        } else if (threadIdx.x == 0 && params.losses != nullptr) {
            params.losses[next] = 0.0f;
        }
        __syncthreads();  // what the block has for the chunk may be overwritten
    }
}

// Launches a kernel whose blocks go over the chunks of `params`, its first argument, by each_chunk.
template <typename Params, typename... Parameters, typename... Arguments>
void launch_chunks(const char* what, void (*kernel)(Params, Parameters...), size_t shared_bytes, const Launch& shape,
                   const Params& params, const Arguments&... arguments) {
    if (params.queue != nullptr) {
        check(what, cudaMemsetAsync(params.queue, 0, sizeof *params.queue, static_cast<cudaStream_t>(shape.stream)));
    }
    launch_shared(what, kernel, shared_bytes, shape, params.chunks, params, arguments...);
}

}  // namespace xtoken::cuda
