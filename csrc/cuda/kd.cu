// KL for one shared tokenizer, a pair of rows by a block. With p and q normalised over the columns C:
//   loss = sum_C q (log q - log p)      d loss / d z = (p - q) / temperature
//   reverse: sum_C p (log p - log q)    d loss / d z = p (log p - log q - loss) / temperature
#include "cuda/kd.h"

#include "cuda/launch.cuh"
#include "cuda/rows.cuh"

namespace xtoken::cuda {
namespace {

// Log-probabilities of a row.
struct Side {
    Exponential exp;
    float log_total, inverse_total;

    __device__ explicit Side(const Statistics& s)
        : exp(s.exp), log_total(static_cast<float>(s.log_total())), inverse_total(static_cast<float>(1.0 / s.total)) {}
    __device__ float log_share(float x) const { return exp.log_share(x, log_total); }
    __device__ float share(float x) const { return exp(x) * inverse_total; }
};

template <typename S>
__global__ __launch_bounds__(max_threads, 1) void kd_kernel(const __grid_constant__ KdParams params) {
    XTOKEN_SHARED(shared, Sums);
    for (int64_t k = blockIdx.x; k < params.chunks; k += gridDim.x) {
        if (params.student_rows[k] < 0) {
            if (threadIdx.x == 0) params.losses[k] = 0.0f;
            continue;
        }
        const Row<S> z(params.student, params.student_rows[k]);
        const AnyRow y(params.teacher, params.teacher_rows[k]);
        const Side p(
            statistics(z, params.chosen, params.columns, params.lowest, params.temperature, shared, Unweighted{}));
        const Side q(
            statistics(y, params.chosen, params.columns, params.lowest, params.temperature, shared, Unweighted{}));
        float part = 0.0f;
        each_column(z, params.chosen, params.columns, [&](int j, const auto& x) {
            constexpr int N = sizeof(x) / sizeof(float);
            float target[N];
            if (params.chosen != nullptr) {
                target[0] = y[params.chosen[j]];
            } else {
                y.elements(j, target);
            }
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const float difference = q.log_share(target[n]) - p.log_share(x[n]);
                part = params.reverse ? fmaf(p.share(x[n]), -difference, part)
                                      : fmaf(q.share(target[n]), difference, part);
            }
        });
        double sums[1] = {static_cast<double>(part)};
        block_sum(sums, shared);
        const double temperature = static_cast<double>(params.temperature);
        if (threadIdx.x == 0) params.losses[k] = static_cast<float>(sums[0] * temperature * temperature);
        if (params.grad.data == nullptr) continue;
        const auto loss = static_cast<float>(sums[0]);
        const auto factor =
            static_cast<float>((params.scale == nullptr ? 1.0 : static_cast<double>(params.scale[k])) * temperature);
        write_row(z, row_of<S>(params.grad, params.student_rows[k]), params.student.width, params.grad.width,
                  [&](int i, const auto& x, auto& g) {
                      constexpr int N = sizeof(x) / sizeof(float);
                      float target[N];
                      y.elements(i, target);
                      int32_t place[N] = {};
                      if (params.place != nullptr) load_lanes(params.place, i, place);
#pragma unroll
                      for (int n = 0; n < N; ++n) {
                          const float share = p.share(x[n]);
                          const float slope = params.reverse
                                                  ? share * (p.log_share(x[n]) - q.log_share(target[n]) - loss)
                                                  : share - q.share(target[n]);
                          g[n] = place[n] < 0 || x[n] < params.lowest ? 0.0f : slope * factor;
                      }
                  });
    }
}

}  // namespace

void kd(const KdParams& params, const Launch& launch) {
    typed(params.student.type, [&](const auto* s) {
        using S = std::remove_const_t<std::remove_pointer_t<decltype(s)>>;
        launch_items("kd", kd_kernel<S>, launch, params.chunks, params);
    });
}

}  // namespace xtoken::cuda
