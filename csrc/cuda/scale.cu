// A gradient times the upstream gradient, which only the device knows.
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"

namespace xtoken::cuda {
namespace {

constexpr int segment = 1 << 16;  // elements that a block takes at a time

template <typename T>
__global__ __launch_bounds__(max_threads, resident_blocks) void scale_kernel(T* data, int64_t size,
                                                                             const float* factor) {
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

struct ScaleParams {
#define XTOKEN_SCALE(FIELD)               \
    FIELD(void*, data, "[size] changed"); \
    FIELD(Element, type, "of data");      \
    FIELD(int64_t, size, "how many");     \
    FIELD(const float*, factor, "[]")
    XTOKEN_FIELDS(XTOKEN_SCALE)
};

// data[i] *= factor[0]; nothing is read or written if that is 1, as it is after a plain loss.backward().
void scale(const ScaleParams& params, const Launch& launch) {
    typed(params.type, [&](const auto* element) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(element)>>;
        launch_items("scale", scale_kernel<T>, 1, launch, (params.size + segment - 1) / segment,
                     static_cast<T*>(params.data), params.size, params.factor);
    });
}

const Launcher launcher("scale", &scale);

}  // namespace
}  // namespace xtoken::cuda
