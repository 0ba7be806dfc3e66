// P-KL of one chunk by one block. The formula is that of xtoken.reference.pkl.
//
// With e the student's exponentials (or, for several tokens, their mean distribution) and Z their sum, x = W^T e, S =
// sum_C x, D = S + eps Z and x' = x + eps D:
//   log(m + eps) = log x' - log D,     u_t = (D / gamma) dL/dm_t,     B = sum_t x_t u_t / D,     h_s = sum_t W_st (u_t
//   - B) dL/dlogit_s = p_s gamma Z / (D temperature) (h_s - sum p h)
// where KL(q || m) has u = q / x' and gamma = -D, and the reverse has u = dL/dm and gamma = 1. For one token sum p h is
// B eps exactly, and S = sum_s w_s e_s needs only W's row sums, so that the softmax needs no pass of its own:
//   1. z: maximum, Z, S               2. y: maximum, sum                 3. sums of columns with several entries
//   4. y, gathers of z: u, loss, B    5. sums of rows with several       6. z, gathers of u: the gradient
// A row is read from memory in the first pass over it and from L2 in the others. Only u is stored.
//
// Where nearly all mass is on one token, h_s - sum p h cancels there: that token's gradient is set to what makes the
// row's sum zero.
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "losses/pkl/params.h"

namespace xtoken::cuda {
namespace {

constexpr int workspace_unit = 32;  // floats; keeps every part of the workspace aligned

__host__ __device__ int64_t whole(int64_t count) {
    return (count + workspace_unit - 1) / workspace_unit * workspace_unit;
}

// Floats of a block's workspace.
struct Workspace {
    int64_t column_sums;  // a zero, and the sums of the columns with several entries
    int64_t u;            // u, a zero, and the sums of the rows with several entries
    int64_t mean;         // the mean distribution of a chunk of several tokens

    __host__ __device__ Workspace(const PklPlan& plan, Merge merge)
        : column_sums(whole(int64_t{1} + plan.column_lists.count)),
          u(whole(int64_t{1} + plan.columns + plan.row_lists.count)),
          mean(merge == Merge::mean ? whole(plan.students) : 0) {}
    __host__ __device__ int64_t total() const { return column_sums + u + mean; }
};

// Sums of value(index) over lists, into out[list].
template <typename Value>
__device__ void sum_lists(const SumLists& lists, float* out, Value value) {
    const int lane = static_cast<int>(threadIdx.x) % warp_size, warps = static_cast<int>(blockDim.x) / warp_size;
    for (int slice = static_cast<int>(threadIdx.x) / warp_size; slice < lists.slices; slice += warps) {
        const bool is_shared = slice < lists.shared;
        const int list = is_shared ? slice : lists.shared + (slice - lists.shared) * warp_size + lane;
        const bool wanted = list < lists.count && (lists.wanted == nullptr || lists.wanted[list] != 0);
        const int begin = lists.start[slice], end = wanted ? lists.start[slice + 1] : begin;
        float total = 0.0f;
#pragma unroll 4
        for (int i = begin; i < end; ++i) {
            const int at = i * warp_size + lane;
            total = fmaf(lists.weight[at], value(lists.index[at]), total);
        }
        if (is_shared) {
            for (int step = warp_size / 2; step > 0; step /= 2) total += __shfl_xor_sync(all_lanes, total, step);
        }
        if (wanted && (!is_shared || lane == 0)) out[list] = total;
    }
}

template <typename S, Merge merge>
class Chunk {
  public:
    __device__ Chunk(const PklParams& p, int64_t k, Sums& shared)
        : p_(p),
          plan_(p.plan),
          columns_(p.plan.count == nullptr ? p.plan.columns : *p.plan.count),
          shared_(shared),
          k_(k),
          row_(p.student_rows.start[k]),
          count_(merge == Merge::first ? 1 : static_cast<int>(p.student_rows.count[k])),
          teacher_row_(p.teacher_rows.start[k]),
          teacher_count_(merge == Merge::first ? 1 : static_cast<int>(p.teacher_rows.count[k])),
          z_(p.student, row_) {
        student_.exp.precise = z_.precise();
        const Workspace parts(p.plan, merge);
        column_sums_ = p.workspace + blockIdx.x * parts.total();
        u_ = column_sums_ + parts.column_sums;
        mean_ = u_ + parts.u;
    }

    __device__ void run(float* weight_sums) {
        const int thread = static_cast<int>(threadIdx.x);
        if (thread == 0) {
            column_sums_[0] = 0.0f;
            u_[plan_.columns] = 0.0f;
        }
        masses();
        sum_lists(plan_.column_lists, column_sums_ + 1, [&](int s) { return mass(s); });
        __syncthreads();  // the columns' sums are there
        columns();

        double loss = loss_, factor = 1.0, later_factor = 0.0;
        if constexpr (merge == Merge::chain) {
            const double student = later_log_probability<Row<S>>(p_.student, p_.student_rows, row_, count_);
            const double teacher =
                later_log_probability<AnyRow>(p_.teacher, p_.teacher_rows, teacher_row_, teacher_count_);
            const double c = ::exp(p_.reverse ? student : teacher);
            loss = c * (loss + (p_.reverse ? student - teacher : teacher - student));
            factor = c;
            later_factor = p_.reverse ? loss + c : -c;
        }
        const double temperature = static_cast<double>(p_.temperature), square = temperature * temperature;
        if (thread == 0) p_.losses[k_] = static_cast<float>(loss * square);
        const double scale = (p_.scale == nullptr ? 1.0 : static_cast<double>(p_.scale[k_])) * square;
        const double unit = scale * factor * (p_.reverse ? 1.0 / d_ : -1.0);
        if (weight_sums != nullptr) add_weight_gradient(weight_sums, static_cast<float>(unit));
        if (p_.grad.data == nullptr) {
            for (int64_t r = row_; r < row_ + count_; ++r) {
                label_term(p_.labels, r, Row<S>(p_.student, r), plan_.students, p_.lowest, shared_);
            }
            return;
        }
        sum_lists(plan_.row_lists, u_ + plan_.columns + 1, [&](int j) { return (u_[j] - b_) - b_low_; });
        __syncthreads();  // the rows' sums are there
        const double share = unit * total_ / (temperature * merged());
        double mean = static_cast<double>(b_) * static_cast<double>(p_.epsilon);
        for (int64_t r = row_; r < row_ + merged(); ++r) {
            const Row<S> z(p_.student, r);
            if (merged() > 1) {
                student_ = statistics(z, nullptr, plan_.students, p_.lowest, p_.temperature, shared_,
                                      [&](int i, auto& h) { row_values(i, h); });
                mean = student_.weighted / student_.total;
            }
            token_gradient(r, z, student_, mean, share);
        }
        if constexpr (merge == Merge::chain) {
            const auto later = static_cast<float>(scale * later_factor / temperature);
            for (int64_t r = row_ + 1; r < row_ + count_; ++r) later_gradient(r, later);
        }
    }

  private:
    // Rows whose distributions are averaged.
    __device__ int merged() const { return merge == Merge::mean ? count_ : 1; }

    // e_s
    __device__ float mass(int s) const { return merged() > 1 ? mean_[s] : student_.exp(z_[s]); }

    // e, Z, S and D.
    __device__ void masses() {
        const auto row_weight = [&](int i, auto& w) { load_lanes(plan_.row_weight, i, w); };
        double weighted;
        if (merged() == 1) {
            student_ = statistics(z_, nullptr, plan_.students, p_.lowest, p_.temperature, shared_, row_weight);
            total_ = student_.total;
            weighted = student_.weighted;
        } else {
            total_ = 1.0;
            for (int i = 0; i < merged(); ++i) {
                const Row<S> z(p_.student, row_ + i);
                // its barriers also separate the additions to `mean` of one row from those of the next
                const Statistics one = row_statistics(z, plan_.students, p_.lowest, p_.temperature, shared_);
                const auto share = static_cast<float>(1.0 / (one.total * merged()));
                each_vector(z, plan_.students, [&](int s, const auto& x) {
                    constexpr int N = sizeof(x) / sizeof(float);
#pragma unroll
                    for (int k = 0; k < N; ++k) {
                        const float p = one.exp(x[k]) * share;
                        mean_[s + k] = i == 0 ? p : mean_[s + k] + p;
                    }
                });
            }
            __syncthreads();  // the mean is there
            float sum = 0.0f;
            for (int s = static_cast<int>(threadIdx.x); s < plan_.students; s += static_cast<int>(blockDim.x)) {
                sum = fmaf(mean_[s], plan_.row_weight[s], sum);
            }
            double sums[1] = {static_cast<double>(sum)};
            block_sum(sums, shared_);
            weighted = sums[0];
        }
        d_ = weighted + static_cast<double>(p_.epsilon) * total_;
    }

    // u, the loss and B.
    __device__ void columns() {
        const auto small = static_cast<float>(static_cast<double>(p_.epsilon) * d_);
        const auto per_d = static_cast<float>(1.0 / d_);
        float loss = 0.0f, b = 0.0f;
        const int merged = merge == Merge::mean ? teacher_count_ : 1;
        AnyRow y(p_.teacher, teacher_row_);
        const int32_t* chosen = plan_.chosen;
        Statistics q = statistics(y, chosen, columns_, p_.lowest, p_.temperature, shared_, Unweighted{});
        double log_total = q.log_total();
        if (merged > 1) {
            log_total = sum_teacher(merged);
            y = AnyRow(u_);
            chosen = nullptr;
            q.exp.top = 0.0f;
            q.exp.lowest = -INFINITY;
            q.exp.inverse_temperature /= static_cast<float>(merged);
        }
        const auto log_sum = static_cast<float>(log_total);
        each_column(y, chosen, columns_, [&](int j, const auto& own) {
            constexpr int N = sizeof(own) / sizeof(float);
            int32_t slot[N];
            load_lanes(plan_.column_slot, j, slot);
            constexpr int M = N < 4 ? N : 4;  // at a time, to keep within the registers
            constexpr bool precise = sizeof(S) == 4;
            float u[N];
#pragma unroll
            for (int first = 0; first < N; first += M) {
                float x[M], log_q[M], share[M];
#pragma unroll
                for (int k = 0; k < M; ++k) {
                    const int from = slot[first + k];
                    x[k] = from < plan_.students ? mass(from) : column_sums_[from - plan_.students];
                    share[k] = log_q[k] = q.exp.log_share(own[first + k], log_sum);
                }
                if (!p_.reverse) exponentials(share, q.exp.precise);
#pragma unroll
                for (int k = 0; k < M; ++k) {
                    const float added = x[k] + small;
                    const float log_m = logarithm(added * per_d, precise);
                    if (p_.reverse) {
                        u[first + k] = (log_m - log_q[k]) + quotient(x[k], added, precise);
                        loss = fmaf(x[k] * per_d, log_m - log_q[k], loss);
                    } else {
                        u[first + k] = quotient(share[k], added, precise);
                        loss = fmaf(share[k], log_q[k] - log_m, loss);
                    }
                    b = fmaf(x[k], u[first + k], b);
                }
            }
            store_lanes(u_, j, u);
        });
        double sums[2] = {static_cast<double>(loss), static_cast<double>(b)};
        block_sum(sums, shared_);  // u is there, too
        loss_ = columns_ > 0 ? sums[0] : static_cast<double>(nanf(""));
        const double mean = sums[1] / d_;
        b_ = static_cast<float>(mean);
        b_low_ = static_cast<float>(mean - static_cast<double>(b_));
    }

    // Sums of the teacher's logits, relative to the rows' maxima, in the place of u; returns the mean of the logarithms
    // of their totals.
    __device__ double sum_teacher(int merged) {
        double log_totals = 0.0;
        for (int i = 0; i < merged; ++i) {
            const AnyRow y(p_.teacher, teacher_row_ + i);
            const Statistics q =
                statistics(y, plan_.chosen, columns_, p_.lowest, p_.temperature, shared_, Unweighted{});
            log_totals += q.log_total() / merged;
            each_column(y, plan_.chosen, columns_, [&](int j, const auto& x) {
                constexpr int N = sizeof(x) / sizeof(float);
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    const float relative = at_least(x[k], p_.lowest) - q.exp.top;
                    u_[j + k] = i == 0 ? relative : u_[j + k] + relative;
                }
            });
        }
        __syncthreads();  // the sums are there; from here on columns are shared out in another way
        return log_totals;
    }

    // Sum over the rows but the first of log p(the token that follows).
    template <typename R>
    __device__ double later_log_probability(const Logits& logits, const ChunkRows& rows, int64_t start, int count) {
        double result = 0.0;
        for (int64_t r = start + 1; r < start + count; ++r) {
            const R z(logits, r);
            const Statistics all = row_statistics(z, logits.width, p_.lowest, p_.temperature, shared_);
            result += all.log_share(z[static_cast<int>(rows.next[r])]);
        }
        return result;
    }

    // h_s of rows s = i ... i + N - 1
    template <int N>
    __device__ void row_values(int i, float (&h)[N]) const {
        int32_t slot[N];
        load_lanes(plan_.row_slot, i, slot);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            h[k] = u_[slot[k]];
            if (slot[k] < plan_.columns) h[k] = (h[k] - b_) - b_low_;
        }
    }

    // The gradient p_s share (h_s - mean) of row r.
    __device__ void token_gradient(int64_t r, const Row<S>& z, const Statistics& one, double mean, double share) {
        const LabelTerm label =
            label_term(p_.labels, r, z, plan_.students, p_.lowest, shared_, p_.temperature == 1.0f, one);
        const auto factor = static_cast<float>(share / one.total);
        const auto high = static_cast<float>(mean), low = static_cast<float>(mean - static_cast<double>(high));
        const bool peaked = one.total < 2.0;  // one token has more than half of the mass
        const auto half = static_cast<float>(0.5 * one.total);
        S* grad = row_of<S>(p_.grad, r);
        float others = 0.0f, peak_label = 0.0f;
        int peak = -1;
        write_row(z, grad, plan_.students, p_.grad.width, [&](int i, const auto& x, auto& g) {
            constexpr int N = sizeof(x) / sizeof(float);
            row_values(i, g);
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const float e = one.exp(x[k]);
                const float added = label(i + k, x[k]);
                const float own = x[k] < p_.lowest ? 0.0f : e * (((g[k] - high) - low) * factor);
                if (peaked) {
                    if (e > half) {
                        peak = i + k;
                        peak_label = added;
                    } else {
                        others += own;
                    }
                }
                g[k] = own + added;
            }
        });
        if (!peaked) return;
        double sums[1] = {static_cast<double>(others)};
        block_sum(sums, shared_);
        if (peak >= 0) narrow(static_cast<float>(static_cast<double>(peak_label) - sums[0]), grad[peak]);
    }

    // A later row under merge="chain": factor * (onehot - softmax).
    __device__ void later_gradient(int64_t r, float factor) {
        const Row<S> z(p_.student, r);
        const Statistics all = row_statistics(z, plan_.students, p_.lowest, p_.temperature, shared_);
        const LabelTerm label =
            label_term(p_.labels, r, z, plan_.students, p_.lowest, shared_, p_.temperature == 1.0f, all);
        const auto weight = static_cast<float>(-static_cast<double>(factor) / all.total);
        const auto next = static_cast<int>(p_.student_rows.next[r]);
        write_row(z, row_of<S>(p_.grad, r), plan_.students, p_.grad.width, [&](int i, const auto& x, auto& g) {
            constexpr int N = sizeof(x) / sizeof(float);
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const float own = fmaf(all.exp(x[k]), weight, i + k == next ? factor : 0.0f);
                g[k] = (x[k] < p_.lowest ? 0.0f : own) + label(i + k, x[k]);
            }
        });
    }

    // d loss / d W[s, t] = e_s gamma / D (u_t - B).
    __device__ void add_weight_gradient(float* sums, float unit) {
        for (int64_t e = threadIdx.x; e < plan_.entries; e += blockDim.x) {
            const float u = u_[plan_.entry_column[e]];
            sums[e] += mass(static_cast<int>(plan_.entry_row[e])) * unit * ((u - b_) - b_low_);
        }
    }

    const PklParams& p_;
    const PklPlan& plan_;
    int columns_;
    Sums& shared_;
    int64_t k_, row_;
    int count_;
    int64_t teacher_row_;
    int teacher_count_;
    Row<S> z_;
    float *column_sums_, *u_, *mean_;
    Statistics student_;
    double total_ = 0.0, d_ = 0.0, loss_ = 0.0;
    float b_ = 0.0f, b_low_ = 0.0f;
};

template <typename S, Merge merge>
__global__ __launch_bounds__(max_threads, 1) void pkl_kernel(const __grid_constant__ PklParams params) {
    XTOKEN_SHARED(shared, Sums);
    float* weight_sums =
        params.weight_sums == nullptr ? nullptr : params.weight_sums + blockIdx.x * params.plan.entries;
    for (int64_t k = blockIdx.x; k < params.chunks; k += gridDim.x) {
        if (is_left_out(params, k)) continue;
        Chunk<S, merge>(params, k, shared).run(weight_sums);
        __syncthreads();  // the workspace may be overwritten
    }
}

__global__ void row_weights_kernel(const int64_t* row_ptr, const int32_t* col, const float* weight,
                                   const int32_t* place, int32_t rows, float* row_weight) {
    const int threads = static_cast<int>(gridDim.x * blockDim.x);
    for (int s = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); s < rows; s += threads) {
        float total = 0.0f;
        for (int64_t i = row_ptr[s]; i < row_ptr[s + 1]; ++i) {
            if (place[col[i]] >= 0) total += weight[i];
        }
        row_weight[s] = total;
    }
}

__global__ void sum_blocks_kernel(const float* sums, int32_t blocks, int64_t entries, float* out) {
    for (int64_t e = blockIdx.x * blockDim.x + threadIdx.x; e < entries; e += gridDim.x * blockDim.x) {
        double total = 0.0;
        for (int b = 0; b < blocks; ++b) total += static_cast<double>(sums[b * entries + e]);
        out[e] = static_cast<float>(total);
    }
}

int64_t workspace_of(const PklParams& params) { return Workspace(params.plan, params.merge).total(); }

// Each chunk by one block; rows of the gradient that belong to no chunk are not touched. Losses are nan for a set of no
// column.
void pkl(const PklParams& params, const Launch& launch) {
    typed(params.student.type, [&](const auto* s) {
        using S = std::remove_const_t<std::remove_pointer_t<decltype(s)>>;
        auto* kernel = pkl_kernel<S, Merge::first>;
        if (params.merge == Merge::mean) kernel = pkl_kernel<S, Merge::mean>;
        if (params.merge == Merge::chain) kernel = pkl_kernel<S, Merge::chain>;
        // sums of several rows of the teacher are a row of floats
        const int slots = AnyRow::slots(params.merge == Merge::mean ? Element::float32 : params.teacher.type);
        launch_items("pkl", kernel, slots, launch, params.chunks, params);
    });
}

struct RowWeightsParams {
#define XTOKEN_ROW_WEIGHTS(FIELD)                                               \
    FIELD(const int64_t*, row_ptr, "[rows + 1] of W");                          \
    FIELD(const int32_t*, col, "[entries] of W");                               \
    FIELD(const float*, weight, "[entries] of W");                              \
    FIELD(const int32_t*, place, "[V_teacher] place in the columns, -1: none"); \
    FIELD(int32_t, rows, "of W");                                               \
    FIELD(float*, row_weight, "[rows] out: sum of the row's weights whose column has a place")
    XTOKEN_FIELDS(XTOKEN_ROW_WEIGHTS)
};

void row_weights(const RowWeightsParams& p, const Launch& launch) {
    const int64_t blocks = (static_cast<int64_t>(p.rows) + launch.threads - 1) / launch.threads;
    launch_items("row_weights", row_weights_kernel, 0, launch, blocks, p.row_ptr, p.col, p.weight, p.place, p.rows,
                 p.row_weight);
}

struct SumBlocksParams {
#define XTOKEN_SUM_BLOCKS(FIELD)                    \
    FIELD(const float*, sums, "[blocks, entries]"); \
    FIELD(int32_t, blocks, "how many");             \
    FIELD(int64_t, entries, "how many");            \
    FIELD(float*, out, "[entries] out: sums over the blocks, in their order")
    XTOKEN_FIELDS(XTOKEN_SUM_BLOCKS)
};

void sum_blocks(const SumBlocksParams& p, const Launch& launch) {
    const int64_t needed = (p.entries + launch.threads - 1) / launch.threads;
    launch_items("sum_blocks", sum_blocks_kernel, 0, launch, needed, p.sums, p.blocks, p.entries, p.out);
}

const Launcher launcher("pkl", &pkl, &workspace_of);
const Launcher weights_launcher("row_weights", &row_weights);
const Launcher sums_launcher("sum_blocks", &sum_blocks);

}  // namespace
}  // namespace xtoken::cuda
