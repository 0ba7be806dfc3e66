// One chunk by one block, in two passes with a sort between them.
//
// With lp, lq the chunk's mean log-probabilities, g_v = d loss / d lp_v is -q_t on a pair (reverse: p_s (lp_s - lq_t +
// 1)) and slope * p_v outside. Each of the n student rows z_i gets d loss / d z_i = (g - softmax(z_i) sum g) / (n tau).
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "losses/ranked/params.h"

namespace xtoken::cuda {
namespace {

// The mean log-probabilities of a chunk's rows on one side. Logits are summed by themselves, so that equal sums stay
// equal, and taken relative to the sum of the rows' maxima, so that floats are exact enough.
template <typename R>
class Side {
  public:
    // `sums` [width]: room for the sums of several rows.
    __device__ Side(const Logits& logits, const ChunkRows& rows, int64_t k, const RankedParams& params, float* sums,
                    Sums& shared)
        : row_(logits, rows.start[k]), count_(static_cast<int>(rows.count[k])), sums_(sums) {
        const int64_t start = rows.start[k];
        double top = 0.0, log_total = 0.0;
        for (int i = 0; i < count_; ++i) {
            const R z(logits, start + i);
            // its barriers also separate the additions of one row from those of the next
            const Statistics one = row_statistics(z, logits.width, params.lowest, params.temperature, shared);
            top += static_cast<double>(one.exp.top);
            log_total += one.log_total() / count_;
            if (count_ > 1) {
                each_vector(z, logits.width, [&](int v, const auto& x) {
                    constexpr int N = sizeof(x) / sizeof(float);
#pragma unroll
                    for (int n = 0; n < N; ++n) {
                        const float own = at_least(x[n], params.lowest);
                        sums_[v + n] = i == 0 ? own : sums_[v + n] + own;
                    }
                });
            }
        }
        __syncthreads();  // the sums are there
        lowest_ = params.lowest;
        top_ = static_cast<float>(top);
        inverse_ = 1.0f / (params.temperature * static_cast<float>(count_));
        log_total_ = static_cast<float>(log_total);
    }

    __device__ float log_share(int v) const {
        const float sum = count_ > 1 ? sums_[v] : at_least(row_[v], lowest_);
        return (sum - top_) * inverse_ - log_total_;
    }
    __device__ float exp(float log_share) const { return exponential(log_share, row_.precise()); }
    __device__ float share(int v) const { return exp(log_share(v)); }

  private:
    R row_;
    int count_;
    float* sums_;
    float lowest_ = 0.0f, top_ = 0.0f, inverse_ = 0.0f, log_total_ = 0.0f;
};

template <typename S>
__global__ __launch_bounds__(max_threads, 1) void ranked_forward_kernel(const __grid_constant__ RankedParams params) {
    XTOKEN_SHARED(shared, Sums);
    const PairsPlan& plan = params.plan;
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    float* student_sums =
        params.workspace + blockIdx.x * (static_cast<int64_t>(params.student.width) + params.teacher.width);
    for (int64_t k = blockIdx.x; k < params.chunks; k += gridDim.x) {
        if (is_left_out(params, k)) continue;
        const Side<Row<S>> p(params.student, params.student_rows, k, params, student_sums, shared);
        const Side<AnyRow> q(params.teacher, params.teacher_rows, k, params, student_sums + params.student.width,
                             shared);
        float part = 0.0f;
#pragma unroll 4
        for (int i = thread; i < plan.pairs; i += threads) {
            const float lp = p.log_share(plan.student_pair[i]), lq = q.log_share(plan.teacher_pair[i]);
            part = params.reverse ? fmaf(p.exp(lp), lp - lq, part) : fmaf(q.exp(lq), lq - lp, part);
        }
        float* student_values = params.student_values + k * plan.student_rest;
#pragma unroll 4
        for (int i = thread; i < plan.student_rest; i += threads) student_values[i] = p.share(plan.student_others[i]);
        float* teacher_values = params.teacher_values + k * plan.teacher_rest;
#pragma unroll 4
        for (int i = thread; i < plan.teacher_rest; i += threads) teacher_values[i] = q.share(plan.teacher_others[i]);
        double sums[1] = {static_cast<double>(part)};
        block_sum(sums, shared);  // and everybody has read the workspace
        const double temperature = static_cast<double>(params.temperature);
        if (thread == 0) params.losses[k] = static_cast<float>(sums[0] * temperature * temperature);
    }
}

template <typename S>
__global__ __launch_bounds__(max_threads, 1) void ranked_backward_kernel(const __grid_constant__ RankedParams params) {
    XTOKEN_SHARED(shared, Sums);
    const PairsPlan& plan = params.plan;
    const int students = params.student.width;
    float* student_sums = params.workspace + blockIdx.x * (static_cast<int64_t>(students) + params.teacher.width);
    for (int64_t k = blockIdx.x; k < params.chunks; k += gridDim.x) {
        if (is_left_out(params, k)) continue;
        const Side<Row<S>> p(params.student, params.student_rows, k, params, student_sums, shared);
        const Side<AnyRow> q(params.teacher, params.teacher_rows, k, params, student_sums + students, shared);
        const float* slope = params.slope + k * plan.student_rest;
        // g_v goes where the sums of the student's logits were, or would be: every element is used by one thread
        float part = 0.0f;
        for (int v = static_cast<int>(threadIdx.x); v < students; v += static_cast<int>(blockDim.x)) {
            const int slot = plan.slot[v];
            const float lp = p.log_share(v);
            float g;
            if (slot < 0) {
                g = slope[-1 - slot] * p.exp(lp);
            } else if (params.reverse) {
                g = p.exp(lp) * (lp - q.log_share(slot) + 1.0f);
            } else {
                g = -q.share(slot);
            }
            part += g;
            student_sums[v] = g;
        }
        double sums[1] = {static_cast<double>(part)};
        block_sum(sums, shared);  // g is there, too
        const int64_t start = params.student_rows.start[k], count = params.student_rows.count[k];
        const double factor = (params.scale == nullptr ? 1.0 : static_cast<double>(params.scale[k])) *
                              static_cast<double>(params.temperature) / static_cast<double>(count);
        for (int64_t r = start; r < start + count; ++r) {
            const Row<S> z(params.student, r);
            const Statistics one = row_statistics(z, students, params.lowest, params.temperature, shared);
            const LabelTerm label =
                label_term(params.labels, r, z, students, params.lowest, shared, params.temperature == 1.0f, one);
            const auto weight = static_cast<float>(-factor * sums[0] / one.total);
            const auto value = static_cast<float>(factor);
            write_row(z, row_of<S>(params.grad, r), students, params.grad.width, [&](int i, const auto& x, auto& g) {
                constexpr int N = sizeof(x) / sizeof(float);
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    g[n] = fmaf(student_sums[i + n], value, one.exp(x[n]) * weight);
                    if (x[n] < params.lowest) g[n] = 0.0f;
                    g[n] += label(i + n, x[n]);
                }
            });
        }
        __syncthreads();  // the workspace may be overwritten
    }
}

int64_t workspace_of(const RankedParams& params) {
    return static_cast<int64_t>(params.student.width) + params.teacher.width;
}

// The loss on the pairs, and the probabilities outside.
void ranked_forward(const RankedParams& params, const Launch& launch) {
    typed(params.student.type, [&](const auto* s) {
        using S = std::remove_const_t<std::remove_pointer_t<decltype(s)>>;
        launch_items("ranked_forward", ranked_forward_kernel<S>, AnyRow::slots(params.teacher.type), launch,
                     params.chunks, params);
    });
}

// The gradient of all rows of the chunks; other rows are not touched.
void ranked_backward(const RankedParams& params, const Launch& launch) {
    typed(params.student.type, [&](const auto* s) {
        using S = std::remove_const_t<std::remove_pointer_t<decltype(s)>>;
        launch_items("ranked_backward", ranked_backward_kernel<S>, AnyRow::slots(params.teacher.type), launch,
                     params.chunks, params);
    });
}

const Launcher forward_launcher("ranked_forward", &ranked_forward, &workspace_of);
const Launcher backward_launcher("ranked_backward", &ranked_backward, &workspace_of);

}  // namespace
}  // namespace xtoken::cuda
