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
struct RowShares {
    Exponential exp;
    float log_total, inverse_total;

    __device__ explicit RowShares(const Statistics& s)
        : exp(s.exp), log_total(static_cast<float>(s.log_total())), inverse_total(static_cast<float>(1.0 / s.total)) {}
    template <int N>
    __device__ void operator()(const float (&x)[N], float (&log_share)[N], float (&share)[N]) const {
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

    __device__ Shares(const RowShares& p, const RowShares& q, const float (&x)[N], const float (&target)[N]) {
        float log_p[N], log_q[N];
        p(x, log_p, own);
        q(target, log_q, other);
#pragma unroll
        for (int n = 0; n < N; ++n) difference[n] = log_q[n] - log_p[n];
    }
};

// A pair of rows and their probabilities.
template <typename S>
struct RowPair {
    const Row<S>& z;
    const AnyRow& y;
    RowShares p, q;

    // body(shares) for the elements of both in the columns.
    template <typename Body>
    __device__ void each(const KdParams& params, Body body) const {
        const auto both = [&](int, const auto& x, const auto& target) {
            body(Shares<sizeof(x) / sizeof(float)>(p, q, x, target));
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
};

// What the gradient needs of a pass before it: the loss, and the mean of the loss's derivative by p.
struct Sum {
    double loss, slope;
};

// Of a divergence that is no mixture: by itself, or for the reverse's gradient.
template <typename S>
__device__ Sum sum_divergence(const KdParams& params, const RowPair<S>& rows, Sums& shared) {
    float part = 0.0f;
    rows.each(params, [&](const auto& shares) {
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
    return {sums[0], sums[0]};
}

template <typename S>
__device__ Sum sum_mixed(const KdParams& params, const RowPair<S>& rows, const MixedDivergence& mixed, Sums& shared) {
    float loss = 0.0f, slope = 0.0f;
    rows.each(params, [&](const auto& shares) {
        constexpr int N = sizeof(shares.own) / sizeof(float);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const MixedDivergence::Terms terms = mixed(shares.difference[n]);
            loss = fmaf(shares.other[n], terms.of_teacher, fmaf(shares.own[n], terms.of_student, loss));
            slope = fmaf(shares.own[n], mixed.slope(terms), slope);
        }
    });
    double sums[2] = {static_cast<double>(loss), static_cast<double>(slope)};
    block_sum(sums, shared);
    return {sums[0], sums[1]};
}

// Writes the gradient of row r; returns this thread's part of the forward KL.
template <bool is_mixed, typename S>
__device__ float write_gradient(const KdParams& params, const RowPair<S>& rows, int64_t r, float factor, float mean,
                                const MixedDivergence& mixed, const LabelTerm& label) {
    float part = 0.0f;
    const auto prepare = [&](int i, const auto& x, const auto& target, auto& g) {
        constexpr int N = sizeof(x) / sizeof(float);
        Shares<N> shares(rows.p, rows.q, x, target);
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
            for (int n = 0; n < N; ++n) g[n] = shares.own[n] * (mixed.slope(mixed(shares.difference[n])) - mean);
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
    };
    const int size = params.student.width;
    const auto both = [&](auto body) { each_pair(rows.z, rows.y, size, body); };
    write_row(rows.z, row_of<S>(params.grad, r), size, params.grad.width, both, prepare);
    return part;
}

template <typename S, bool is_mixed>
__global__ __launch_bounds__(max_threads, resident_blocks) void kd_kernel(const __grid_constant__ KdParams params) {
    XTOKEN_SHARED(shared, Sums);
    const double temperature = static_cast<double>(params.temperature);
    each_chunk(params, [&](int64_t k) {
        const int64_t r = params.student_rows.start[k];
        const Row<S> z(params.student, r);
        const AnyRow y(params.teacher, params.teacher_rows.start[k]);
        const auto over_columns = [&](const auto& row) {
            return statistics(row, params.chosen, params.columns, params.lowest, params.temperature, shared,
                              Unweighted{});
        };
        // Both rows do not stay in L2 until they are read again; the teacher's does, alone.
        const Row<S> brief = z.kept(Keep::briefly);
        const AnyRow last = y.kept(Keep::briefly);
        const Statistics student = over_columns(brief), teacher = over_columns(y);
        const RowPair<S> rows{brief, last, RowShares(student), RowShares(teacher)};
        const LabelTerm label = label_term(params.labels, r, z, params.student.width, params.lowest, shared,
                                           params.chosen == nullptr && params.temperature == 1.0f, student);
        const MixedDivergence mixed(params.divergence, z.precise() || y.precise());
        const bool has_gradient = params.grad.data != nullptr, summed_before = params.reverse || !has_gradient;
        Sum sum{};
        if constexpr (is_mixed) {
            sum = sum_mixed(params, rows, mixed, shared);
        } else if (summed_before) {
            sum = sum_divergence(params, rows, shared);
        }
        if (has_gradient) {
            const double scale = params.scale == nullptr ? 1.0 : static_cast<double>(params.scale[k]);
            const float part = write_gradient<is_mixed>(params, rows, r, static_cast<float>(scale * temperature),
                                                        static_cast<float>(sum.slope), mixed, label);
            if (!is_mixed && !summed_before) {
                double sums[1] = {static_cast<double>(part)};
                block_sum(sums, shared);
                sum.loss = sums[0];
            }
        }
        if (threadIdx.x == 0) params.losses[k] = static_cast<float>(sum.loss * (temperature * temperature));
    });
}

// Each chunk by one block; rows of the gradient that belong to no chunk are not touched.
void kd(const KdParams& params, const Launch& launch) {
    typed(params.student.type, [&](const auto* s) {
        using S = std::remove_const_t<std::remove_pointer_t<decltype(s)>>;
        auto* kernel = params.divergence.is_mixed() ? kd_kernel<S, true> : kd_kernel<S, false>;
        const int slots = 1 + AnyRow::slots(params.teacher.type);
        launch_chunks("kd", kernel, Ring::bytes(slots), launch, params);
    });
}

const Launcher launcher("kd", &kd);

}  // namespace

}  // namespace xtoken::cuda
