// KL for one shared tokenizer, a pair of rows by a block. With p and q normalised over the columns C:
//   loss = sum_C q (log q - log p)      d loss / d z = (p - q) / temperature
//   reverse: sum_C p (log p - log q)    d loss / d z = p (log p - log q - loss) / temperature
// Both rows are passed over for their sums and again for the gradient, where the loss is summed as well; only the
// gradient of the reverse needs it before.
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "losses/kd/params.h"

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

// The loss of a pair of rows by itself.
template <typename S>
__device__ double divergence(const KdParams& params, const Row<S>& z, const AnyRow& y, const Side& p, const Side& q,
                             Sums& shared) {
    float part = 0.0f;
    const auto add = [&](int, const auto& x, const auto& target) {
        constexpr int N = sizeof(x) / sizeof(float);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const float difference = q.log_share(target[n]) - p.log_share(x[n]);
            part = params.reverse ? fmaf(p.share(x[n]), -difference, part) : fmaf(q.share(target[n]), difference, part);
        }
    };
    if (params.chosen == nullptr) {
        each_pair(z, y, params.columns, add);
    } else {
        each_chosen(z, params.chosen, params.columns, [&](int j, const float (&x)[1]) {
            const float target[1] = {y[params.chosen[j]]};
            add(j, x, target);
        });
    }
    double sums[1] = {static_cast<double>(part)};
    block_sum(sums, shared);
    return sums[0];
}

template <typename S>
__global__ __launch_bounds__(max_threads, 1) void kd_kernel(const __grid_constant__ KdParams params) {
    XTOKEN_SHARED(shared, Sums);
    const double temperature = static_cast<double>(params.temperature), square = temperature * temperature;
    for (int64_t k = blockIdx.x; k < params.chunks; k += gridDim.x) {
        if (is_left_out(params, k)) continue;
        const int64_t r = params.student_rows.start[k];
        const Row<S> z(params.student, r);
        const AnyRow y(params.teacher, params.teacher_rows.start[k]);
        const Statistics own =
            statistics(z, params.chosen, params.columns, params.lowest, params.temperature, shared, Unweighted{});
        const Side p(own);
        const Side q(
            statistics(y, params.chosen, params.columns, params.lowest, params.temperature, shared, Unweighted{}));
        const LabelTerm label = label_term(params.labels, r, z, params.student.width, params.lowest, shared,
                                           params.chosen == nullptr && params.temperature == 1.0f, own);
        const bool alone = params.reverse || params.grad.data == nullptr;
        double loss[1] = {alone ? divergence(params, z, y, p, q, shared) : 0.0};
        if (params.grad.data != nullptr) {
            const auto mean = static_cast<float>(loss[0]);
            const auto factor = static_cast<float>(
                (params.scale == nullptr ? 1.0 : static_cast<double>(params.scale[k])) * temperature);
            float part = 0.0f;
            write_row(z, y, row_of<S>(params.grad, r), params.student.width, params.grad.width,
                      [&](int i, const auto& x, const auto& target, auto& g) {
                          constexpr int N = sizeof(x) / sizeof(float);
                          int32_t place[N] = {};
                          if (params.place != nullptr) load_lanes(params.place, i, place);
#pragma unroll
                          for (int n = 0; n < N; ++n) {
                              const float difference = q.log_share(target[n]) - p.log_share(x[n]);
                              const float share = p.share(x[n]);
                              float slope;
                              if (params.reverse) {
                                  slope = share * (-difference - mean);
                              } else {
                                  const float other = q.share(target[n]);
                                  slope = share - other;
                                  if (place[n] >= 0) part = fmaf(other, difference, part);
                              }
                              const float added = place[n] < 0 || x[n] < params.lowest ? 0.0f : slope * factor;
                              g[n] = added + label(i + n, x[n]);
                          }
                      });
            if (!alone) {
                loss[0] = static_cast<double>(part);
                block_sum(loss, shared);
            }
        }
        if (threadIdx.x == 0) params.losses[k] = static_cast<float>(loss[0] * square);
    }
}

// Each chunk by one block; rows of the gradient that belong to no chunk are not touched.
void kd(const KdParams& params, const Launch& launch) {
    typed(params.student.type, [&](const auto* s) {
        using S = std::remove_const_t<std::remove_pointer_t<decltype(s)>>;
        launch_items("kd", kd_kernel<S>, 1 + AnyRow::slots(params.teacher.type), launch, params.chunks, params);
    });
}

const Launcher launcher("kd", &kd);

}  // namespace

}  // namespace xtoken::cuda
