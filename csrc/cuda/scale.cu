// A gradient times the upstream gradient, which only the device knows.
#include "cuda/scale.h"

#include "cuda/launch.cuh"
#include "cuda/rows.cuh"

namespace xtoken::cuda {
namespace {

constexpr int segment = 1 << 16;  // elements that a block takes at a time

template <typename T>
__global__ __launch_bounds__(max_threads, 1) void scale_kernel(T* data, int64_t size, const float* factor) {
    const float f = *factor;
    if (f == 1.0f) return;
    for (int64_t begin = int64_t{segment} * blockIdx.x; begin < size; begin += int64_t{segment} * gridDim.x) {
        const int count = size - begin < segment ? static_cast<int>(size - begin) : segment;
        write_row(Row<T>(data + begin), data + begin, count, count, [&](int, const auto& x, auto& g) {
            constexpr int N = sizeof(x) / sizeof(float);
#pragma unroll
            for (int k = 0; k < N; ++k) g[k] = x[k] * f;
        });
    }
}

}  // namespace

void scale(void* data, Element type, int64_t size, const float* factor, const Launch& launch) {
    typed(type, [&](const auto* element) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(element)>>;
        launch_items("scale", scale_kernel<T>, launch, (size + segment - 1) / segment, static_cast<T*>(data), size,
                     factor);
    });
}

}  // namespace xtoken::cuda
