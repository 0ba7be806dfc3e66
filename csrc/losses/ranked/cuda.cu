// One chunk by one block: all of it where both sides are one row of 16-bit logits (steps.cuh), else in two passes with
// a sort between them.
//
// With lp, lq the chunk's mean log-probabilities, g_v = d loss / d lp_v is -q_t on a pair (reverse: p_s (lp_s - lq_t +
// 1)) and slope * p_v outside. Each of the n student rows z_i gets d loss / d z_i = (g - softmax(z_i) sum g) / (n tau).
#include "cuda/chunks.cuh"
#include "cuda/divergence.cuh"
#include "cuda/rows.cuh"
#include "losses/ranked/params.h"
#include "losses/ranked/steps.cuh"

namespace xtoken::cuda {
namespace {

// What pairs add to the loss, and g, from lp and lq; how precise the exponential of each has to be.
class PairTerms {
  public:
    __device__ PairTerms(const Divergence& d, bool reverse, bool student_precise, bool teacher_precise)
        : mixture_(d, student_precise || teacher_precise),
          mixed_(is_mixed(d)),
          reverse_(reverse),
          student_precise_(student_precise),
          teacher_precise_(teacher_precise) {}

    __device__ float added_to(float loss, float lp, float lq) const {
        if (mixed_) {
            const MixedDivergence::Terms terms = mixture_(lq - lp);
            return fmaf(p(lp), terms.of_student, fmaf(q(lq), terms.of_teacher, loss));
        }
        return reverse_ ? fmaf(p(lp), lp - lq, loss) : fmaf(q(lq), lq - lp, loss);
    }
    __device__ float g(float lp, float lq) const {
        if (mixed_) return p(lp) * mixture_.slope(mixture_(lq - lp));
        return reverse_ ? p(lp) * (lp - lq + 1.0f) : -q(lq);
    }

  private:
    __device__ float p(float lp) const { return exponential(lp, student_precise_); }
    __device__ float q(float lq) const { return exponential(lq, teacher_precise_); }

    MixedDivergence mixture_;
    bool mixed_, reverse_, student_precise_, teacher_precise_;
};

// ---- both sides one row of 16-bit logits ----

struct StepsShared {
    Sums sums;
    BinSums bins;
};

// Statistics of a row, and the steps of what is outside the pairs.
template <bool counts_are_shared, typename T>
__device__ Statistics find_steps(const Row<T>& row, int size, const uint8_t* common, const StepsParams& params,
                                 Bins<T>& bins, int32_t* counts, Steps& steps, StepsShared& shared) {
    const Statistics one = count_elements<counts_are_shared>(row, size, common, params.lowest, params.temperature, bins,
                                                             counts, shared.sums);
    list_steps(bins, counts, one, steps, shared.bins);
    return one;
}

// Three or four passes over a chunk's rows z and y: z, y, both at the pairs, z again.
template <typename S, bool counts_are_shared>
__global__ __launch_bounds__(max_threads, 1) void ranked_kernel(const __grid_constant__ StepsParams params,
                                                                int student_bins, int teacher_bins, int64_t words) {
    XTOKEN_SHARED(shared, StepsShared);
    XTOKEN_DYNAMIC_SHARED(unsigned char, memory);  // of the ring, and behind it the counts
    const PairsPlan& plan = params.plan;
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int students = params.student.width, teachers = params.teacher.width;
    float* student_steps = params.workspace + blockIdx.x * words;
    float* teacher_steps = student_steps + Steps::words(student_bins);
    // of the student's bins, then of the teacher's; at last the gradient of each of the student's, the bits of a float
    int32_t* counts = counts_are_shared ? reinterpret_cast<int32_t*>(memory + Ring::bytes(1, threads))
                                        : reinterpret_cast<int32_t*>(teacher_steps + Steps::words(teacher_bins));

    each_chunk(params, [&](int64_t k) {
        const int64_t r = params.student_rows.start[k], teacher_row = params.teacher_rows.start[k];
        const Row<S> z(params.student, r);
        const AnyRow y(params.teacher, teacher_row);
        Steps p(student_steps, student_bins), q(teacher_steps, teacher_bins);
        Bins<S> bins(params.temperature, params.lowest);
        const Statistics student =
            find_steps<counts_are_shared>(z, students, plan.student_common, params, bins, counts, p, shared);
        Statistics teacher;
        if (params.teacher.type == Element::bfloat16) {
            Bins<__nv_bfloat16> own(params.temperature, params.lowest);
            teacher = find_steps<counts_are_shared>(Row<__nv_bfloat16>(params.teacher, teacher_row), teachers,
                                                    plan.teacher_common, params, own, counts, q, shared);
        } else {
            Bins<__half> own(params.temperature, params.lowest);
            teacher = find_steps<counts_are_shared>(Row<__half>(params.teacher, teacher_row), teachers,
                                                    plan.teacher_common, params, own, counts, q, shared);
        }

        const auto student_log = static_cast<float>(student.log_total());
        const auto teacher_log = static_cast<float>(teacher.log_total());
        const PairTerms terms(params.divergence, params.reverse, z.precise(), y.precise());
        float loss = 0.0f, mass = 0.0f;  // of the pairs, and the sum of their g
#pragma unroll 4
        for (int i = thread; i < plan.pairs; i += threads) {
            const float lp = student.exp.log_share(z[plan.student_pair[i]], student_log);
            const float lq = teacher.exp.log_share(y[plan.teacher_pair[i]], teacher_log);
            loss = terms.added_to(loss, lp, lq);
            mass += terms.g(lp, lq);
        }

        // a teacher that is not a number gives no gradient that is one
        double sums[2] = {static_cast<double>(loss), static_cast<double>(mass) + 0.0 * teacher.total};
        for (int j = thread; j < p.count; j += threads) {
            const int signs = sum_of_signs(p, j, q, params.ranks);
            const double part = static_cast<double>(signs) * static_cast<double>(p.value[j]);
            sums[0] += part;
            sums[1] += part;
            counts[p.bin[j]] = signs;
        }
        for (int j = thread; j < q.count; j += threads) {
            sums[0] += static_cast<double>(sum_of_signs(q, j, p, params.ranks)) * static_cast<double>(q.value[j]);
        }
        block_sum(sums, shared.sums);
        const auto temperature = static_cast<double>(params.temperature);
        if (thread == 0) params.losses[k] = static_cast<float>(sums[0] * temperature * temperature);
        const LabelTerm label =
            label_term(params.labels, r, z, students, params.lowest, shared.sums, params.temperature == 1.0f, student);
        if (params.grad.data == nullptr) return;

        const double factor = (params.scale == nullptr ? 1.0 : static_cast<double>(params.scale[k])) * temperature;
        for (int j = thread; j < p.count; j += threads) {  // the thread that has found the signs
            const int bin = p.bin[j], ranks = p.start[j + 1] - p.start[j];
            const double slope = static_cast<double>(counts[bin]) / ranks - sums[1];
            const double g =
                bin == bins.in_order(bins.count() - 1) ? 0.0 : factor * slope * static_cast<double>(p.value[j]);
            counts[bin] = __float_as_int(static_cast<float>(g));
        }
        __syncthreads();  // the gradient of each bin is there
        S* out = row_of<S>(params.grad, r);
        const auto by_bin = [&](float x) { return __int_as_float(counts[bins(x)]); };
        if (plan.pairs == 0) {
            write_row(z, out, students, params.grad.width, [&](int i, const auto& x, auto& g) {
                constexpr int N = sizeof(x) / sizeof(float);
#pragma unroll
                for (int n = 0; n < N; ++n) g[n] = by_bin(x[n]);
                label.add(i, x, g);
            });
        } else {
            const auto value = static_cast<float>(factor), total = static_cast<float>(sums[1]);
            write_row(z, out, students, params.grad.width, [&](int i, const auto& x, auto& g) {
                constexpr int N = sizeof(x) / sizeof(float);
                int slot[N];
                float partner[N];
                load_lanes(plan.slot, i, slot);
                y.gather(slot, partner);
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    const float lp = student.exp.log_share(x[n], student_log);
                    const float lq = teacher.exp.log_share(partner[n], teacher_log);
                    const float inside = fmaf(-exponential(lp, z.precise()), total, terms.g(lp, lq));
                    const float of_pair = x[n] < params.lowest ? 0.0f : value * inside;
                    g[n] = slot[n] < 0 ? by_bin(x[n]) : of_pair;
                }
                label.add(i, x, g);
            });
        }
    });
}

// Bins of both sides of a call, and where they are counted.
struct StepsLayout {
    explicit StepsLayout(const StepsParams& params)
        : student_bins(bins_of(params.student.type, params)),
          teacher_bins(bins_of(params.teacher.type, params)),
          counted(student_bins > teacher_bins ? student_bins : teacher_bins) {
        is_shared = Ring::bytes(1, max_threads) + counts_bytes() + sizeof(StepsShared) + queue_bytes <=
                    shared_memory_of_a_block();
    }
    size_t counts_bytes() const { return static_cast<size_t>(counted) * sizeof(int32_t); }
    int64_t words() const {
        return Steps::words(student_bins) + Steps::words(teacher_bins) + (is_shared ? 0 : counted);
    }
    int student_bins, teacher_bins, counted;
    bool is_shared = false;  // or in the workspace, where a multiprocessor has too little shared memory

  private:
    static int bins_of(Element type, const StepsParams& params) {
        return type == Element::float16 ? Bins<__half>(params.temperature, params.lowest).size()
                                        : Bins<__nv_bfloat16>(params.temperature, params.lowest).size();
    }
};

int64_t words_of(const StepsParams& params) { return StepsLayout(params).words(); }

// The losses of all chunks, and the gradient of their rows; other rows are not touched.
void ranked(const StepsParams& params, const Launch& launch) {
    if (params.student.type == Element::float32 || params.teacher.type == Element::float32) {
        value_error("ranked: expected logits of 16 bits");
    }
    const StepsLayout layout(params);
    const auto start = [&](auto kernel) {
        const size_t counts = layout.is_shared ? layout.counts_bytes() : 0;
        launch_chunks("ranked", kernel, Ring::bytes(1, launch.threads) + counts, launch, params, layout.student_bins,
                      layout.teacher_bins, layout.words());
    };
    const auto start_typed = [&](auto* in_shared, auto* in_workspace) {
        if (layout.is_shared) {
            start(in_shared);
        } else {
            start(in_workspace);
        }
    };
    if (params.student.type == Element::bfloat16) {
        start_typed(ranked_kernel<__nv_bfloat16, true>, ranked_kernel<__nv_bfloat16, false>);
    } else {
        start_typed(ranked_kernel<__half, true>, ranked_kernel<__half, false>);
    }
}

const Launcher steps_launcher("ranked", &ranked, &words_of);

// ---- all other chunks ----

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
    __device__ bool precise() const { return row_.precise(); }
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
    each_chunk(params, [&](int64_t k) {
        const Side<Row<S>> p(params.student, params.student_rows, k, params, student_sums, shared);
        const Side<AnyRow> q(params.teacher, params.teacher_rows, k, params, student_sums + params.student.width,
                             shared);
        const PairTerms terms(params.divergence, params.reverse, p.precise(), q.precise());
        float part = 0.0f;
#pragma unroll 4
        for (int i = thread; i < plan.pairs; i += threads) {
            const float lp = p.log_share(plan.student_pair[i]), lq = q.log_share(plan.teacher_pair[i]);
            part = terms.added_to(part, lp, lq);
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
    });
}

template <typename S>
__global__ __launch_bounds__(max_threads, 1) void ranked_backward_kernel(const __grid_constant__ RankedParams params) {
    XTOKEN_SHARED(shared, Sums);
    const PairsPlan& plan = params.plan;
    const int students = params.student.width;
    float* student_sums = params.workspace + blockIdx.x * (static_cast<int64_t>(students) + params.teacher.width);
    each_chunk(params, [&](int64_t k) {
        const Side<Row<S>> p(params.student, params.student_rows, k, params, student_sums, shared);
        const Side<AnyRow> q(params.teacher, params.teacher_rows, k, params, student_sums + students, shared);
        const float* slope = params.slope + k * plan.student_rest;
        const PairTerms terms(params.divergence, params.reverse, p.precise(), q.precise());
        // g_v goes where the sums of the student's logits were, or would be: every element is used by one thread
        float part = 0.0f;
        for (int v = static_cast<int>(threadIdx.x); v < students; v += static_cast<int>(blockDim.x)) {
            const int slot = plan.slot[v];
            const float lp = p.log_share(v);
            float g;
            if (slot < 0) {
                g = slope[-1 - slot] * p.exp(lp);
            } else {
                g = terms.g(lp, q.log_share(slot));
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
    });
}

int64_t workspace_of(const RankedParams& params) {
    return static_cast<int64_t>(params.student.width) + params.teacher.width;
}

// The loss on the pairs, and the probabilities outside.
void ranked_forward(const RankedParams& params, const Launch& launch) {
    typed(params.student.type, [&](const auto* s) {
        using S = std::remove_const_t<std::remove_pointer_t<decltype(s)>>;
        launch_chunks("ranked_forward", ranked_forward_kernel<S>,
                      Ring::bytes(AnyRow::slots(params.teacher.type), launch.threads), launch, params);
    });
}

// The gradient of all rows of the chunks; other rows are not touched.
void ranked_backward(const RankedParams& params, const Launch& launch) {
    typed(params.student.type, [&](const auto* s) {
        using S = std::remove_const_t<std::remove_pointer_t<decltype(s)>>;
        launch_chunks("ranked_backward", ranked_backward_kernel<S>,
                      Ring::bytes(AnyRow::slots(params.teacher.type), launch.threads), launch, params);
    });
}

const Launcher forward_launcher("ranked_forward", &ranked_forward, &workspace_of);
const Launcher backward_launcher("ranked_backward", &ranked_backward, &workspace_of);

}  // namespace
}  // namespace xtoken::cuda
