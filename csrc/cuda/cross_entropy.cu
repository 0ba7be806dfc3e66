// Next-token cross-entropy of a row by a block: logsumexp(z) - z[label], and scale * (softmax(z) - onehot(label)).
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"

namespace xtoken::cuda {
namespace {

struct CrossEntropyParams {
#define XTOKEN_CUDA_CROSS_ENTROPY(FIELD)                                                                    \
    FIELD(Logits, student, "[B, T, V], of the vocabulary's width");                                         \
    FIELD(Logits, grad, "as student, perhaps wider; null: losses only");                                    \
    FIELD(Labels, labels, "of the rows; the loss of an id out of range is nan");                            \
    FIELD(float, lowest, "smaller logits count as this one");                                               \
    FIELD(bool, add,                                                                                        \
          "to `factor` times the gradient, and nothing at all if the scale is 0 and that is 1; else every " \
          "element of a row is written, zeros where it has no label");                                      \
    FIELD(const float*, factor, "[] null: 1");                                                              \
    FIELD(const uint8_t*, skip, "[rows] rows to leave alone; null: none")
    XTOKEN_FIELDS(XTOKEN_CUDA_CROSS_ENTROPY)
};

struct MarkRowsParams {
#define XTOKEN_MARK_ROWS(FIELD)                 \
    FIELD(ChunkRows, rows, "the chunks' rows"); \
    FIELD(int64_t, chunks, "how many");         \
    FIELD(uint8_t*, covered, "[rows] out: 1 for every row of a chunk; others are not touched")
    XTOKEN_FIELDS(XTOKEN_MARK_ROWS)
};

template <typename T>
__global__ __launch_bounds__(max_threads, resident_blocks) void cross_entropy_kernel(
    const __grid_constant__ CrossEntropyParams params) {
    XTOKEN_SHARED(shared, Sums);
    // The factors are known only here: nobody waits for the device.
    const float factor = params.factor == nullptr ? 1.0f : *params.factor;
    Labels labels = params.labels;
    if (params.add && *labels.scale == 0.0) labels.ids = nullptr;
    if (params.add && labels.ids == nullptr && factor == 1.0f) return;
    const int size = params.student.width;
    for (int64_t r = blockIdx.x; r < params.student.samples * params.student.length; r += gridDim.x) {
        if (params.skip != nullptr && params.skip[r] != 0) continue;
        const Row<T> z(params.student, r);
        const LabelTerm label = label_term(labels, r, z, size, params.lowest, shared);
        if (params.grad.data == nullptr || (params.add && label.label < 0 && factor == 1.0f)) continue;
        T* grad = row_of<T>(params.grad, r);
        if (!params.add && label.label < 0) {
            Written<T>(z, grad).fill(0, params.grad.width);
            continue;
        }
        // a row without a label is only scaled: its logits are not read
        write_row(params.add && label.label < 0 ? Row<T>(grad) : z, grad, size, params.add ? size : params.grad.width,
                  [&](int i, const auto& x, auto& g) {
                      constexpr int N = sizeof(x) / sizeof(float);
                      if (params.add) {
                          Row<T>(grad).elements(i, g);
#pragma unroll
                          for (int k = 0; k < N; ++k) g[k] *= factor;
                      } else {
#pragma unroll
                          for (int k = 0; k < N; ++k) g[k] = 0.0f;
                      }
                      label.add(i, x, g);
                  });
    }
}

__global__ void mark_rows_kernel(const int64_t* start, const int64_t* count, int64_t chunks, uint8_t* covered) {
    const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; k < chunks; k += threads) {
        for (int64_t r = start[k]; r < start[k] + count[k]; ++r) covered[r] = 1;
    }
}

void cross_entropy(const CrossEntropyParams& params, const Launch& launch) {
    typed(params.student.type, [&](const auto* element) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(element)>>;
        launch_items("cross_entropy", cross_entropy_kernel<T>, 1, launch,
                     params.student.samples * params.student.length, params);
    });
}

void mark_rows(const MarkRowsParams& p, const Launch& launch) {
    launch_items("mark_rows", mark_rows_kernel, 0, launch, (p.chunks + launch.threads - 1) / launch.threads,
                 p.rows.start, p.rows.count, p.chunks, p.covered);
}

const Launcher launcher("cross_entropy", &cross_entropy);
const Launcher mark_launcher("mark_rows", &mark_rows);

}  // namespace
}  // namespace xtoken::cuda
