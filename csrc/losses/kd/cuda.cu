// KL for one shared tokenizer, a pair of rows by a block. With p and q normalised over the columns C:
//   loss = sum_C q (log q - log p)      d loss / d z = (p - q) / temperature
//   reverse: sum_C p (log p - log q)    d loss / d z = p (log p - log q - loss) / temperature
//   mixed: D                          d loss / d z = p (dD / dp - sum_C p dD / dp) / temperature
// Both rows are passed over for their sums and again for the gradient, where the loss is summed as well; only the
// gradients of the reverse and of mixed divergences need sums of a pass before.
#include "cuda/chunks.cuh"
#include "cuda/divergence.cuh"
#include "cuda/rows.cuh"
#include "losses/kd/params.h"

namespace xtoken::cuda {
namespace {

// A row's probabilities and their logarithms.
struct Side {
    Exponential exp;
    float log_total, inverse_total;

    __device__ explicit Side(const Statistics& s)
        : exp(s.exp), log_total(static_cast<float>(s.log_total())), inverse_total(static_cast<float>(1.0 / s.total)) {}
    template <int N>
    __device__ void shares(const float (&x)[N], float (&log_share)[N], float (&share)[N]) const {
        exp.log_shares(x, log_total, log_share);
        exp(x, share);
#pragma unroll
        for (int n = 0; n < N; ++n) share[n] *= inverse_total;
    }
};

// Of elements of both rows: log q - log p, p and q.
template <int N>
struct Shares {
    float difference[N], own[N], other[N];

    __device__ Shares(const Side& p, const Side& q, const float (&x)[N], const float (&target)[N]) {
        float log_p[N], log_q[N];
        p.shares(x, log_p, own);
        q.shares(target, log_q, other);
#pragma unroll
        for (int n = 0; n < N; ++n) difference[n] = log_q[n] - log_p[n];
    }
};

// Calls add(shares) for the elements of both rows in the columns.
template <typename S, typename Add>
__device__ void each_shares(const KdParams& params, const Row<S>& z, const AnyRow& y, const Side& p, const Side& q,
                            Add add) {
    const auto both = [&](int, const auto& x, const auto& target) {
        add(Shares<sizeof(x) / sizeof(float)>(p, q, x, target));
    };
    if (params.chosen == nullptr) {
        each_pair(z, y, params.columns, both);
    } else {
        each_chosen(z, params.chosen, params.columns, [&](int j, const auto& x) {
            const float target[1] = {y[params.chosen[j]]};
            both(j, x, target);
        });
    }
}

// The loss of a pair of rows by itself.
template <typename S>
__device__ double divergence(const KdParams& params, const Row<S>& z, const AnyRow& y, const Side& p, const Side& q,
                             Sums& shared) {
    float part = 0.0f;
    each_shares(params, z, y, p, q, [&](const auto& shares) {
        constexpr int N = sizeof(shares.own) / sizeof(float);
        if (params.reverse) {
#pragma unroll
            for (int n = 0; n < N; ++n) part = fmaf(shares.own[n], -shares.difference[n], part);
        } else {
#pragma unroll
            for (int n = 0; n < N; ++n) part = fmaf(shares.other[n], shares.difference[n], part);
        }
    });
    double sums[1] = {static_cast<double>(part)};
    block_sum(sums, shared);
    return sums[0];
}

// A mixed divergence, and the mean of its derivative by p.
template <typename S>
__device__ void mixed_sums(const KdParams& params, const Row<S>& z, const AnyRow& y, const Side& p, const Side& q,
                           const MixedDivergence& mixed, Sums& shared, double (&sums)[2]) {
    float loss = 0.0f, slope = 0.0f;
    each_shares(params, z, y, p, q, [&](const auto& shares) {
        constexpr int N = sizeof(shares.own) / sizeof(float);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const MixedDivergence::Terms terms = mixed(shares.difference[n]);
            loss = fmaf(shares.other[n], terms.of_teacher, fmaf(shares.own[n], terms.of_student, loss));
            slope = fmaf(shares.own[n], mixed.slope(terms), slope);
        }
    });
    sums[0] = static_cast<double>(loss);
    sums[1] = static_cast<double>(slope);
    block_sum(sums, shared);
}

template <typename S, bool is_mixed>
__global__ __launch_bounds__(max_threads, 1) void kd_kernel(const __grid_constant__ KdParams params) {
    XTOKEN_SHARED(shared, Sums);
    const double temperature = static_cast<double>(params.temperature), square = temperature * temperature;
    each_chunk(params, [&](int64_t k) {
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
        const MixedDivergence mixed(params.divergence, z.precise() || y.precise());
        const bool alone = is_mixed || params.reverse || params.grad.data == nullptr;
        double loss[1] = {0.0}, average = 0.0;
        if constexpr (is_mixed) {
            double sums[2];
            mixed_sums(params, z, y, p, q, mixed, shared, sums);
            loss[0] = sums[0];
            average = sums[1];
        } else if (alone) {
            average = loss[0] = divergence(params, z, y, p, q, shared);
        }
        if (params.grad.data != nullptr) {
            const auto mean = static_cast<float>(average);
            const auto factor = static_cast<float>(
                (params.scale == nullptr ? 1.0 : static_cast<double>(params.scale[k])) * temperature);
            float part = 0.0f;
            write_row(z, y, row_of<S>(params.grad, r), params.student.width, params.grad.width,
                      [&](int i, const auto& x, const auto& target, auto& g) {
                          constexpr int N = sizeof(x) / sizeof(float);
                          Shares<N> shares(p, q, x, target);
                          float shown[N];
#pragma unroll
                          for (int n = 0; n < N; ++n) shown[n] = x[n];
                          if (params.place != nullptr) {
                              int32_t place[N];
                              load_lanes(params.place, i, place);
#pragma unroll
                              for (int n = 0; n < N; ++n) {  // what is not among the columns adds nothing
                                  if (place[n] >= 0) continue;
                                  shares.other[n] = shares.difference[n] = 0.0f;
                                  shown[n] = -INFINITY;
                              }
                          }
                          if constexpr (is_mixed) {
#pragma unroll
                              for (int n = 0; n < N; ++n) {
                                  g[n] = shares.own[n] * (mixed.slope(mixed(shares.difference[n])) - mean);
                              }
                          } else if (params.reverse) {
#pragma unroll
                              for (int n = 0; n < N; ++n) g[n] = shares.own[n] * (-shares.difference[n] - mean);
                          } else {
#pragma unroll
                              for (int n = 0; n < N; ++n) {
                                  g[n] = shares.own[n] - shares.other[n];
                                  part = fmaf(shares.other[n], shares.difference[n], part);
                              }
                          }
#pragma unroll
                          for (int n = 0; n < N; ++n) g[n] = shown[n] < params.lowest ? 0.0f : g[n] * factor;
                          label.add(i, x, g);
                      });
            if (!alone) {
                loss[0] = static_cast<double>(part);
                block_sum(loss, shared);
            }
        }
        if (threadIdx.x == 0) params.losses[k] = static_cast<float>(loss[0] * square);
    });
}

// Each chunk by one block; rows of the gradient that belong to no chunk are not touched.
void kd(const KdParams& params, const Launch& launch) {
    typed(params.student.type, [&](const auto* s) {
        using S = std::remove_const_t<std::remove_pointer_t<decltype(s)>>;
        auto* kernel = params.divergence.is_mixed() ? kd_kernel<S, true> : kd_kernel<S, false>;
        const int slots = 1 + AnyRow::slots(params.teacher.type);
        launch_chunks("kd", kernel, Ring::bytes(slots, launch.threads), launch, params);
    });
}

const Launcher launcher("kd", &kd);

}  // namespace

}  // namespace xtoken::cuda
