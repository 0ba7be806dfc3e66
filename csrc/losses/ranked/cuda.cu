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

    // Of N pairs; which divergence it is is asked once.
    template <int N>
    __device__ void operator()(const float (&lp)[N], const float (&lq)[N], float (&loss)[N], float (&g)[N]) const {
        if (mixed_) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const MixedDivergence::Terms terms = mixture_(lq[n] - lp[n]);
                loss[n] = fmaf(p(lp[n]), terms.of_student, q(lq[n]) * terms.of_teacher);
                g[n] = p(lp[n]) * mixture_.slope(terms);
            }
        } else if (reverse_) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const float own = p(lp[n]);
                loss[n] = own * (lp[n] - lq[n]);
                g[n] = loss[n] + own;
            }
        } else {
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const float other = q(lq[n]);
                loss[n] = other * (lq[n] - lp[n]);
                g[n] = -other;
            }
        }
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
template <bool counts_are_shared, bool ahead, typename T>
__device__ Statistics find_steps(const Row<T>& row, int size, const int32_t* common, const StepsParams& params,
                                 Bins<T>& bins, int32_t* counts, Steps& steps, StepsShared& shared) {
    const Statistics one = count_elements<counts_are_shared, ahead>(row, size, common, params.lowest,
                                                                    params.temperature, bins, counts, shared.sums);
    list_steps(bins, counts, one, steps, shared.bins);
    return one;
}

// The teacher's row is of either type.
template <bool counts_are_shared, bool ahead>
__device__ Statistics find_teacher_steps(const StepsParams& params, int64_t row, int32_t* counts, Steps& steps,
                                         StepsShared& shared) {
    const auto find = [&](const auto& y, auto bins) {
        return find_steps<counts_are_shared, ahead>(y, params.teacher.width, params.plan.teacher_common, params, bins,
                                                    counts, steps, shared);
    };
    if (params.teacher.type == Element::bfloat16) {
        return find(Row<__nv_bfloat16>(params.teacher, row).kept(Keep::partly),
                    Bins<__nv_bfloat16>(params.temperature, params.lowest));
    }
    return find(Row<__half>(params.teacher, row).kept(Keep::partly), Bins<__half>(params.temperature, params.lowest));
}

// Log-probabilities of a row, from its logits.
struct LogShares {
    Exponential exp;
    float log_total;

    __device__ explicit LogShares(const Statistics& s) : exp(s.exp), log_total(static_cast<float>(s.log_total())) {}
    template <int N>
    __device__ void operator()(const float (&x)[N], float (&log_share)[N]) const {
        exp.log_shares(x, log_total, log_share);
    }
};

// Both sides of a chunk where they are pairs.
template <typename S>
struct Pairs {
    Row<S> z;
    AnyRow y;
    const int32_t* slot;  // [students] of the student's tokens: see PairsPlan
    int students;
    LogShares p, q;
    PairTerms terms;

    // body(i, x, slot, loss, g, lp) for the student's logits x from i on: what each adds to the loss, g, and its
    // log-probability; the first two are of no use where a slot is negative. `ahead`: the copies and gathers of
    // each_partner.
    template <bool ahead, typename Body>
    __device__ void each(Body body) const {
        const auto both = [&](int i, const auto& x, const auto& places, const auto& partner) {
            constexpr int N = sizeof(x) / sizeof(float);
            float lp[N], lq[N], loss[N], g[N];
            p(x, lp);
            q(partner, lq);
            terms(lp, lq, loss, g);
            body(i, x, places, loss, g, lp);
        };
        if constexpr (ahead) {
            each_partner(z, y, slot, students, both);
        } else {
            each_vector(z, students, [&](int i, const auto& x) {
                constexpr int N = sizeof(x) / sizeof(float);
                int32_t places[N];
                float partner[N];
                load_lanes(slot, i, places);
                y.gather(places, partner);
                both(i, x, places, partner);
            });
        }
    }
};

// A loss, and the sum of its g.
struct LossAndMass {
    float loss = 0.0f, mass = 0.0f;
};

// A thread's part of the pairs.
template <bool ahead, typename S>
__device__ LossAndMass sum_pairs(const Pairs<S>& pairs) {
    LossAndMass sum;
    pairs.template each<ahead>([&](int, const auto& x, const auto& slot, const auto& loss, const auto& g, const auto&) {
        constexpr int N = sizeof(x) / sizeof(float);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            sum.loss += slot[n] < 0 ? 0.0f : loss[n];
            sum.mass += slot[n] < 0 ? 0.0f : g[n];
        }
    });
    return sum;
}

// A thread's part of the L1 between the sorted probabilities, and of the sum of its g. Where each of the student's bins
// was counted is now the sum of the signs of its ranks.
__device__ inline void sum_steps(const Steps& p, const Steps& q, int ranks, int32_t* counts, double& loss,
                                 double& mass) {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    for (int j = thread; j < p.count; j += threads) {
        const int signs = sum_of_signs(p, j, q, ranks);
        const double part = static_cast<double>(signs) * static_cast<double>(p.value[j]);
        loss += part;
        mass += part;
        counts[p.bin[j]] = signs;
    }
    for (int j = thread; j < q.count; j += threads) {
        loss += static_cast<double>(sum_of_signs(q, j, p, ranks)) * static_cast<double>(q.value[j]);
    }
}

// Puts the gradient of each of the student's bins where the sum of its signs was, as the bits of a float.
template <typename S>
__device__ void find_gradients(const Steps& p, const Bins<S>& bins, double mass, double factor, int32_t* counts) {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    for (int j = thread; j < p.count; j += threads) {  // the thread that has found the signs
        const int bin = p.bin[j], ranks = p.start[j + 1] - p.start[j];
        const double slope = static_cast<double>(counts[bin]) / ranks - mass;
        const double g =
            bin == bins.in_order(bins.count() - 1) ? 0.0 : factor * slope * static_cast<double>(p.value[j]);
        counts[bin] = __float_as_int(static_cast<float>(g));
    }
    __syncthreads();  // the gradient of each bin is there
}

// The row's gradient: that of a logit's bin, and on the pairs factor * (g - p mass).
template <bool ahead, typename S>
__device__ void write_gradient(const Pairs<S>& pairs, bool has_pairs, const Bins<S>& bins, const int32_t* counts,
                               float mass, float factor, float lowest, const LabelTerm& label, S* out, int width) {
    const auto by_bin = [&](float x) { return __int_as_float(counts[bins(x)]); };
    if (!has_pairs) {
        write_row(pairs.z, out, pairs.students, width, [&](int i, const auto& x, auto& g) {
            constexpr int N = sizeof(x) / sizeof(float);
#pragma unroll
            for (int n = 0; n < N; ++n) g[n] = by_bin(x[n]);
            label.add(i, x, g);
        });
        return;
    }
    write_row(
        pairs.z, out, pairs.students, width, [&](auto body) { pairs.template each<ahead>(body); },
        [&](int i, const auto& x, const auto& slot, const auto&, const auto& inside, const auto& lp, auto& g) {
            constexpr int N = sizeof(x) / sizeof(float);
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const float of_pair = factor * fmaf(-exponential(lp[n], false), mass, inside[n]);
                g[n] = slot[n] < 0 ? by_bin(x[n]) : x[n] < lowest ? 0.0f : of_pair;
            }
            label.add(i, x, g);
        });
}

// Three or four passes over a chunk's rows z and y: z, y, both at the pairs, z again. `ring_slots`: of the ring, behind
// which the counts are if they are shared.
template <typename S, bool counts_are_shared, bool ahead>
__global__ __launch_bounds__(max_threads,
                             resident_blocks) void ranked_kernel(const __grid_constant__ StepsParams params,
                                                                 int student_bins, int teacher_bins, int64_t words,
                                                                 int ring_slots) {
    XTOKEN_SHARED(shared, StepsShared);
    XTOKEN_DYNAMIC_SHARED(unsigned char, memory);
    const PairsPlan& plan = params.plan;
    const int students = params.student.width;
    float* student_steps = params.workspace + blockIdx.x * words;
    float* teacher_steps = student_steps + Steps::words(student_bins);
    // of the student's bins, then of the teacher's; at last the gradient of each of the student's
    int32_t* counts = counts_are_shared ? reinterpret_cast<int32_t*>(memory + Ring::bytes(ring_slots))
                                        : reinterpret_cast<int32_t*>(teacher_steps + Steps::words(teacher_bins));

    each_chunk(params, [&](int64_t k) {
        const int64_t r = params.student_rows.start[k], teacher_row = params.teacher_rows.start[k];
        // read three times each, of which L2 holds a part
        const Row<S> z = Row<S>(params.student, r).kept(Keep::partly);
        Steps p(student_steps, student_bins), q(teacher_steps, teacher_bins);
        Bins<S> bins(params.temperature, params.lowest);
        const Statistics student =
            find_steps<counts_are_shared, ahead>(z, students, plan.student_common, params, bins, counts, p, shared);
        const Statistics teacher = find_teacher_steps<counts_are_shared, ahead>(params, teacher_row, counts, q, shared);

        Pairs<S> pairs{z,
                       AnyRow(params.teacher, teacher_row).kept(Keep::partly),
                       plan.slot,
                       students,
                       LogShares(student),
                       LogShares(teacher),
                       PairTerms(params.divergence, params.reverse, false, false)};
        LossAndMass sum;
        if (plan.pairs != 0) sum = sum_pairs<ahead>(pairs);
        // a teacher that is not a number gives no gradient that is one
        double sums[2] = {static_cast<double>(sum.loss), static_cast<double>(sum.mass) + 0.0 * teacher.total};
        sum_steps(p, q, params.ranks, counts, sums[0], sums[1]);
        block_sum(sums, shared.sums);
        const auto temperature = static_cast<double>(params.temperature);
        if (threadIdx.x == 0) params.losses[k] = static_cast<float>(sums[0] * temperature * temperature);
        const LabelTerm label =
            label_term(params.labels, r, z, students, params.lowest, shared.sums, params.temperature == 1.0f, student);
        if (params.grad.data == nullptr) return;

        const double factor = (params.scale == nullptr ? 1.0 : static_cast<double>(params.scale[k])) * temperature;
        find_gradients(p, bins, sums[1], factor, counts);
        pairs.z = z.kept(Keep::briefly);
        pairs.y = pairs.y.kept(Keep::briefly);
        write_gradient<ahead>(pairs, plan.pairs != 0, bins, counts, static_cast<float>(sums[1]),
                              static_cast<float>(factor), params.lowest, label, row_of<S>(params.grad, r),
                              params.grad.width);
    });
}

// What a launch has in shared memory: the ring, that of each_partner if there are pairs and room for it beside the
// counts, and the counts; a multiprocessor with too little memory for these has them in the workspace.
struct StepsLayout {
    explicit StepsLayout(const StepsParams& params)
        : student_bins(bins_of(params.student.type, params)),
          teacher_bins(bins_of(params.teacher.type, params)),
          counted(student_bins > teacher_bins ? student_bins : teacher_bins) {
        constexpr int with_table = 1 + AnyRow::slots(Element::float32);
        counts_are_shared = fits(1);
        // float16 has bins for which there is never so much room
        ahead = params.plan.pairs != 0 && params.student.type == Element::bfloat16 && fits(with_table);
        ring_slots = ahead ? with_table : 1;
    }
    size_t shared_bytes() const { return Ring::bytes(ring_slots) + (counts_are_shared ? counts_bytes() : 0); }
    int64_t words() const {
        return Steps::words(student_bins) + Steps::words(teacher_bins) + (counts_are_shared ? 0 : counted);
    }
    int student_bins, teacher_bins, counted, ring_slots;
    bool counts_are_shared, ahead;

  private:
    static int bins_of(Element type, const StepsParams& params) {
        return type == Element::float16 ? Bins<__half>(params.temperature, params.lowest).size()
                                        : Bins<__nv_bfloat16>(params.temperature, params.lowest).size();
    }
    size_t counts_bytes() const { return static_cast<size_t>(counted) * sizeof(int32_t); }
    bool fits(int slots) const {
        return Ring::bytes(slots) + counts_bytes() + sizeof(StepsShared) + queue_bytes <= shared_memory_of_a_block();
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
        launch_chunks("ranked", kernel, layout.shared_bytes(), launch, params, layout.student_bins, layout.teacher_bins,
                      layout.words(), layout.ring_slots);
    };
    if (layout.ahead) return start(ranked_kernel<__nv_bfloat16, true, true>);
    typed(params.student.type, [&](const auto* s) {
        using S = std::remove_const_t<std::remove_pointer_t<decltype(s)>>;
        if constexpr (sizeof(S) == 2) {
            start(layout.counts_are_shared ? ranked_kernel<S, true, false> : ranked_kernel<S, false, false>);
        }
    });
}

const Launcher steps_launcher("ranked", &ranked, &words_of);

// ---- all other chunks ----

// The mean log-probabilities of a chunk's rows on one side. Logits are summed by themselves, so that equal sums stay
// equal, each relative to its row's maximum, so that floats are exact enough.
template <typename R>
class Side {
  public:
    // `sums` [width]: room for the sums of several rows.
    __device__ Side(const Logits& logits, const ChunkRows& rows, int64_t k, const RankedParams& params, float* sums,
                    Sums& shared)
        : row_(logits, rows.start[k]), count_(static_cast<int>(rows.count[k])), sums_(sums) {
        const int64_t start = rows.start[k];
        double log_total = 0.0;
        for (int i = 0; i < count_; ++i) {
            const R z(logits, start + i);
            // its barriers also separate the additions of one row from those of the next
            const Statistics one = row_statistics(z, logits.width, params.lowest, params.temperature, shared);
            top_ = count_ > 1 ? 0.0f : one.exp.top;
            log_total += one.log_total() / count_;
            if (count_ > 1) {
                each_vector(z, logits.width, [&](int v, const auto& x) {
                    constexpr int N = sizeof(x) / sizeof(float);
#pragma unroll
                    for (int n = 0; n < N; ++n) {
                        const float own = at_least(x[n], params.lowest) - one.exp.top;
                        sums_[v + n] = i == 0 ? own : sums_[v + n] + own;
                    }
                });
            }
        }
        __syncthreads();  // the sums are there
        lowest_ = params.lowest;
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
__global__ __launch_bounds__(max_threads,
                             resident_blocks) void ranked_forward_kernel(const __grid_constant__ RankedParams params) {
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
            const float lp[1] = {p.log_share(plan.student_pair[i])}, lq[1] = {q.log_share(plan.teacher_pair[i])};
            float loss[1], g[1];
            terms(lp, lq, loss, g);
            part += loss[0];
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
__global__ __launch_bounds__(max_threads,
                             resident_blocks) void ranked_backward_kernel(const __grid_constant__ RankedParams params) {
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
            const float lp[1] = {p.log_share(v)};
            float g[1];
            if (slot < 0) {
                g[0] = slope[-1 - slot] * p.exp(lp[0]);
            } else {
                const float lq[1] = {q.log_share(slot)};
                float loss[1];
                terms(lp, lq, loss, g);
            }
            part += g[0];
            student_sums[v] = g[0];
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
        launch_chunks("ranked_forward", ranked_forward_kernel<S>, Ring::bytes(AnyRow::slots(params.teacher.type)),
                      launch, params);
    });
}

// The gradient of all rows of the chunks; other rows are not touched.
void ranked_backward(const RankedParams& params, const Launch& launch) {
    typed(params.student.type, [&](const auto* s) {
        using S = std::remove_const_t<std::remove_pointer_t<decltype(s)>>;
        launch_chunks("ranked_backward", ranked_backward_kernel<S>, Ring::bytes(AnyRow::slots(params.teacher.type)),
                      launch, params);
    });
}

const Launcher forward_launcher("ranked_forward", &ranked_forward, &workspace_of);
const Launcher backward_launcher("ranked_backward", &ranked_backward, &workspace_of);

}  // namespace
}  // namespace xtoken::cuda
