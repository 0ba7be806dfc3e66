// P-KL of one chunk by one block. The formula is that of xtoken.reference.pkl.
//
// With e the student's exponentials (or, for several tokens, their mean distribution) and Z their sum, x = W^T e, S =
// sum_C x, D = S + eps Z and m = x / D:
//   u_t = +-dL/dm_t,     B = sum_t m_t u_t,     h_s = sum_t W_st (u_t - B)
//   dL/dlogit_s = +-p_s Z / (D temperature) (h_s - sum p h)
// where KL(q || m) has u = q / (m + eps) and the sign -. For one token sum p h is B eps exactly. The passes:
//   1. z: maximum, Z, sum of the pairs' x        2. sums of columns with several entries: S
//   3. y: maximum, sum, columns without entries  4. the other columns that are no pair's: u, loss, B
//   5. z, gathers of y: the pairs' loss and B    6. sums of rows with several entries
//   7. z, gathers of y and of the sums: the gradient
// Only u of the columns that are no pair's and the sums are stored, in shared memory where it has room for them.
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
    int64_t stored;   // u, a zero, and the sums, first of columns and then of rows, with several entries
    int64_t mean;     // the mean distribution of a chunk of several tokens, then its h
    int64_t teacher;  // sums of the teacher's logits over the chunk

    __host__ __device__ Workspace(const PklPlan& plan, Merge merge)
        : stored(whole(int64_t{1} + plan.columns + max(plan.column_lists.count, plan.row_lists.count))),
          mean(merge == Merge::mean ? whole(plan.students) : 0),
          teacher(merge == Merge::mean ? whole(plan.empty == nullptr ? plan.columns : plan.teachers) : 0) {}
    __host__ __device__ int64_t total() const { return stored + mean + teacher; }
};

// The exponentials of a row and sums over it. They are powers of e where logits have all bits of a float, else of 2,
// for which there is an instruction.
template <bool precise>
struct Powers {
    static constexpr double unit = precise ? 1.0 : 0.6931471805599453;  // the base's logarithm
    __device__ static float power_of(float x) { return precise ? expf(x) : fast_exp2(x); }
    __device__ static float log(float x) { return precise ? logf(x) : fast_log2(x); }

    float scale, top, floor, shift;  // exponent(x) = max(x - top, floor) scale - shift
    double total, weighted,
        entropy;  // sums of 2^exponent, weight 2^exponent, weight 2^exponent exponent, without shift
    int place;    // of the vector with the largest element; -1: another thread's

    __device__ void set_top(float x, float lowest) {
        top = x;
        floor = lowest - x;
    }
    __device__ float power(float x) const { return power_of(largest(x - top, floor) * scale); }
    __device__ float exponent(float x) const { return fmaf(largest(x - top, floor), scale, -shift); }
    // without shift
    template <int N>
    __device__ void of(const float (&x)[N], float (&e)[N]) const {
#pragma unroll
        for (int k = 0; k < N; ++k) e[k] = power(x[k]);
    }
    // As rows.cuh has it.
    __device__ Statistics statistics(float lowest, float temperature) const {
        return {{precise, top, lowest, 1.0f / temperature}, total, weighted};
    }
};

// One pass over (the chosen elements of) a row, see `statistics`.
template <bool precise, bool with_entropy, typename R, typename Weights>
__device__ Powers<precise> powers_of(const R& row, const int32_t* chosen, int size, float lowest, float temperature,
                                     Sums& shared, const Weights& weights) {
    Powers<precise> p{(precise ? 1.0f : log2_e) / temperature, lowest, 0.0f, 0.0f, 0.0, 0.0, 0.0, -1};
    float total = 0.0f, weighted = 0.0f, entropy = 0.0f;
    const auto rescale = [&](float top) {
        const float fall = (p.top - top) * p.scale, shrink = p.power_of(fall);
        if constexpr (with_entropy) entropy = shrink * fmaf(fall, weighted, entropy);
        total *= shrink;
        weighted *= shrink;
        p.set_top(top, lowest);
    };
    each_column(row, chosen, size, [&](int i, const auto& x) {
        constexpr int N = sizeof(x) / sizeof(float);
        float top = x[0];
#pragma unroll
        for (int k = 1; k < N; ++k) top = fmaxf(top, x[k]);
        if (top > p.top) {
            p.place = i;
            rescale(top);
        }
        float w[N], e[N];
        weights(i, w);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            const float exponent = p.exponent(x[k]);
            e[k] = p.power_of(exponent);
            if constexpr (with_entropy) entropy = fmaf(w[k] * e[k], exponent, entropy);
        }
#pragma unroll
        for (int k = 0; k < N; ++k) {
            total += e[k];
            weighted = fmaf(w[k], e[k], weighted);
        }
    });
    const float top = block_max(p.top, shared);
    if (p.top < top) p.place = -1;
    rescale(top);
    double sums[3] = {static_cast<double>(total), static_cast<double>(weighted), static_cast<double>(entropy)};
    block_sum(sums, shared);
    p.total = sums[0];
    p.weighted = sums[1];
    p.entropy = sums[2];
    return p;
}

// Eight flags a byte, as numbers.
struct Flags {
    const uint8_t* bytes;  // null: zeros

    template <int N>
    __device__ void operator()(int i, float (&x)[N]) const {
        static_assert(N <= 8, "of two bytes");
        const unsigned bits = bytes == nullptr ? 0 : (bytes[i / 8] | unsigned{bytes[i / 8 + 1]} << 8) >> (i % 8);
#pragma unroll
        for (int k = 0; k < N; ++k) x[k] = (bits >> k & 1) != 0 ? 1.0f : 0.0f;
    }
};

// Sums of value(index) over lists, into out[list]. Returns the sum of those that this thread writes.
template <typename Value>
__device__ float sum_lists(const SumLists& lists, float* out, Value value) {
    float written = 0.0f;
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int lane = thread % warp_size, long_lists = lists.count - lists.few;
    const auto is_wanted = [&](int list) { return lists.wanted == nullptr || lists.wanted[list] != 0; };
    for (int slice = thread / warp_size; slice < lists.slices; slice += threads / warp_size) {
        const bool is_shared = slice < lists.shared;
        const int list = is_shared ? slice : lists.shared + (slice - lists.shared) * warp_size + lane;
        const bool wanted = list < long_lists && is_wanted(list);
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
        if (wanted && (!is_shared || lane == 0)) {
            out[list] = total;
            written += total;
        }
    }
    constexpr int lanes = 4, together = 4;  // loads in flight
    const int behind = lists.start[lists.slices] * warp_size;
    for (int first = thread; first < lists.few; first += together * threads) {
        int32_t index[together][lanes];
        float weight[together][lanes], total[together];
        bool wanted[together];
#pragma unroll
        for (int n = 0; n < together; ++n) {
            const int list = first + n * threads;
            wanted[n] = list < lists.few && is_wanted(long_lists + list);
            if (!wanted[n]) continue;
            load_lanes(lists.index, behind + lanes * list, index[n]);
            load_lanes(lists.weight, behind + lanes * list, weight[n]);
        }
#pragma unroll
        for (int n = 0; n < together; ++n) {
            if (!wanted[n]) continue;
            total[n] = 0.0f;
#pragma unroll
            for (int i = 0; i < lanes; ++i) total[n] = fmaf(weight[n][i], value(index[n][i]), total[n]);
        }
#pragma unroll
        for (int n = 0; n < together; ++n) {
            if (!wanted[n]) continue;
            out[long_lists + first + n * threads] = total[n];
            written += total[n];
        }
    }
    return written;
}

template <typename S, Merge merge>
class Chunk {
  public:
    // `workspace` and `stored`: see Workspace.
    __device__ Chunk(const PklParams& p, int64_t k, float* workspace, float* stored, Sums& shared)
        : p_(p),
          plan_(p.plan),
          columns_(p.plan.count == nullptr ? p.plan.columns : *p.plan.count),
          shared_(shared),
          k_(k),
          row_(p.student_rows.start[k]),
          count_(merge == Merge::first ? 1 : static_cast<int>(p.student_rows.count[k])),
          teacher_row_(p.teacher_rows.start[k]),
          teacher_count_(merge == Merge::first ? 1 : static_cast<int>(p.teacher_rows.count[k])),
          z_(p.student, row_),
          y_(p.teacher, teacher_row_),
          stored_(stored) {
        const Workspace parts(p.plan, merge);
        mean_ = workspace + parts.stored;
        sums_ = mean_ + parts.mean;
    }

    __device__ void run(float* weight_sums) {
        const int thread = static_cast<int>(threadIdx.x);
        if (thread == 0) stored_[plan_.columns] = 0.0f;
        masses();
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
        const double unit = scale * factor * (p_.reverse ? 1.0 : -1.0) / d_;
        const auto b = static_cast<float>(b_), b_rest = static_cast<float>(b_ - static_cast<double>(b));
        for (int n = thread; n < columns_; n += static_cast<int>(blockDim.x)) stored_[n] = (stored_[n] - b) - b_rest;
        __syncthreads();  // u is relative to B now
        if (weight_sums != nullptr) add_weight_gradient(weight_sums, static_cast<float>(unit));
        if (p_.grad.data == nullptr) {
            for (int64_t r = row_; r < row_ + count_; ++r) {
                label_term(p_.labels, r, Row<S>(p_.student, r), plan_.students, p_.lowest, shared_);
            }
            return;
        }
        sum_lists(plan_.row_lists, stored_ + plan_.columns + 1, [&](int n) { return stored_[n]; });
        __syncthreads();  // the rows' sums are there
        const double share = unit * total_ / (temperature * merged());
        if (merged() == 1) {
            token_gradient(row_, z_, b_ * static_cast<double>(p_.epsilon), share);
        } else {
            mean_values();
            for (int64_t r = row_; r < row_ + merged(); ++r) {
                const Row<S> z(p_.student, r);
                student_ = powers_of<precise, false>(z, nullptr, plan_.students, p_.lowest, p_.temperature, shared_,
                                                     [&](int i, auto& h) { load_lanes(mean_, i, h); });
                token_gradient(r, z, student_.weighted / student_.total, share);
            }
        }
        if constexpr (merge == Merge::chain) {
            const auto later = static_cast<float>(scale * later_factor / temperature);
            for (int64_t r = row_ + 1; r < row_ + count_; ++r) later_gradient(r, later);
        }
    }

  private:
    static constexpr bool precise = sizeof(S) == 4;
    static constexpr double unit = Powers<precise>::unit;

    // Rows whose distributions are averaged.
    __device__ int merged() const { return merge == Merge::mean ? count_ : 1; }

    // e_s
    __device__ float mass(int s) const { return merged() > 1 ? mean_[s] : student_.power(z_[s]); }

    // e, Z, the sums of columns, S and D.
    __device__ void masses() {
        const Flags paired{plan_.paired};
        double own;  // S without the columns that are stored
        if (merged() == 1) {
            student_ =
                powers_of<precise, false>(z_, nullptr, plan_.students, p_.lowest, p_.temperature, shared_, paired);
            total_ = student_.total;
            own = student_.weighted;
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
            float sum = 0.0f, is_paired[1];
            for (int s = static_cast<int>(threadIdx.x); s < plan_.students; s += static_cast<int>(blockDim.x)) {
                paired(s, is_paired);
                sum = fmaf(mean_[s], is_paired[0], sum);
            }
            double sums[1] = {static_cast<double>(sum)};
            block_sum(sums, shared_);
            own = sums[0];
        }
        float sum = sum_lists(plan_.column_lists, stored_ + plan_.columns + 1, [&](int s) { return mass(s); });
        if (plan_.empty == nullptr) {
            for (int n = static_cast<int>(threadIdx.x); n < columns_; n += static_cast<int>(blockDim.x)) {
                if (plan_.column_slot[n] < plan_.students) sum += mass(plan_.column_slot[n]);
            }
        }
        double sums[1] = {static_cast<double>(sum)};
        block_sum(sums, shared_);  // the columns' sums are there, too
        d_ = own + sums[0] + static_cast<double>(p_.epsilon) * total_;
    }

    // u of the columns that are stored, the loss and B.
    __device__ void columns() {
        const int merged = merge == Merge::mean ? teacher_count_ : 1;
        const bool all = plan_.empty != nullptr;
        const int size = all ? plan_.teachers : columns_;
        const int32_t* chosen = all ? nullptr : plan_.stored;
        const Flags empty{plan_.empty};
        double log_total;  // of the teacher's powers, to their base
        if (merged == 1) {
            teacher_ = powers_of<precise, true>(y_, chosen, size, p_.lowest, p_.temperature, shared_, empty);
            log_total = ::log(teacher_.total) / unit;
        } else {
            log_total = sum_teacher(chosen, size, merged) / unit;
            y_ = AnyRow(sums_);
            constexpr float lowest = -1e30f;  // sums of logits are finite
            teacher_ = powers_of<precise, true>(y_, nullptr, size, lowest, p_.temperature * merged, shared_, empty);
            log_total -= static_cast<double>(teacher_.top) * static_cast<double>(teacher_.scale);
        }
        // Exponents of q: the whole part of log_total is taken off, the rest multiplies q and m.
        const double whole_part = ::rint(log_total), lift = ::exp((log_total - whole_part) * unit);
        teacher_.shift = static_cast<float>(whole_part);
        to_mass_ = static_cast<float>(lift / d_);
        small_ = static_cast<float>(lift * static_cast<double>(p_.epsilon));

        float loss = 0.0f, b = 0.0f;
        constexpr int N = 4;  // loads in flight
        const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
        for (int first = thread; first < columns_; first += N * threads) {
            int32_t place[N], slot[N];
            float x[N], y[N], u[N];
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const int n = first + k * threads;
                place[k] = n >= columns_ ? -1 : all || merged == 1 ? plan_.stored[n] : n;
                slot[k] = n >= columns_ ? plan_.students : plan_.column_slot[n];
            }
            y_.gather(place, y);
#pragma unroll
            for (int k = 0; k < N; ++k) {
                x[k] = slot[k] < plan_.students ? mass(slot[k]) : stored_[plan_.columns + slot[k] - plan_.students];
            }
            slopes(place, x, y, u, loss, b);
#pragma unroll
            for (int k = 0; k < N; ++k) {
                if (first + k * threads < columns_) stored_[first + k * threads] = u[k];
            }
        }
        if (plan_.paired != nullptr) {
            each_partner(z_, y_, plan_.row_slot, plan_.students,
                         [&](int i, const auto& z, const auto& place, const auto& y) {
                             float x[sizeof(z) / sizeof(float)], u[sizeof(z) / sizeof(float)];
                             masses_of(i, z, x);
                             slopes(place, x, y, u, loss, b);
                         });
        }
        double sums[2] = {static_cast<double>(loss), static_cast<double>(b)};
        block_sum(sums, shared_);
        loss_ = size > 0 ? sums[0] * unit * (p_.reverse ? 1.0 / d_ : 1.0 / lift) : static_cast<double>(nanf(""));
        if (!p_.reverse) {  // of the columns without entries, where m is 0
            const double distance = log_total + ::log(static_cast<double>(p_.epsilon)) / unit;
            loss_ += unit * ::exp(-log_total * unit) * (teacher_.entropy - teacher_.weighted * distance);
        }
        b_ = sums[1] / d_;
    }

    // e_s of rows s = i ... i + N - 1, whose logits are z.
    template <int N>
    __device__ void masses_of(int i, const float (&z)[N], float (&x)[N]) const {
        if (merged() > 1) {
            load_lanes(mean_, i, x);
        } else {
            student_.of(z, x);
        }
    }

    // u of columns with these x and logits y of the teacher, at `place` (negative: no column). Adds to the loss, which
    // lacks a factor, and to B D.
    template <int N>
    __device__ void slopes(const int32_t (&place)[N], const float (&x)[N], const float (&y)[N], float (&u)[N],
                           float& loss, float& b) const {
        if (p_.reverse) {
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const float e = place[k] < 0 ? 0.0f : x[k], m = e * to_mass_, added = m + small_;
                const float difference = teacher_.log(added) - teacher_.exponent(y[k]);
                u[k] = fmaf(difference, static_cast<float>(unit), quotient(m, added, precise));
                loss = fmaf(e, difference, loss);
                b = fmaf(e, u[k], b);
            }
        } else {
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const float exponent = teacher_.exponent(y[k]);
                const float q = place[k] < 0 ? 0.0f : teacher_.power_of(exponent), added = fmaf(x[k], to_mass_, small_);
                u[k] = quotient(q, added, precise);
                loss = fmaf(q, exponent - teacher_.log(added), loss);
                b = fmaf(x[k], u[k], b);
            }
        }
    }

    // h - mean of rows of which `place` is the slot, or the column of a pair with these x and y.
    template <int N>
    __device__ void row_values(const int32_t (&place)[N], const float (&x)[N], const float (&y)[N], double mean,
                               float (&h)[N]) const {
        const auto all = static_cast<float>(b_ + mean), rest = static_cast<float>(b_ + mean - static_cast<double>(all));
        float u[N], unused = 0.0f;
        slopes(place, x, y, u, unused, unused);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            h[k] = place[k] < 0 ? stored_[-1 - place[k]] - static_cast<float>(mean) : (u[k] - all) - rest;
        }
    }

    // h in the place of the mean distribution.
    __device__ void mean_values() {
        __syncthreads();  // gradients of W have been added
        for (int s = static_cast<int>(threadIdx.x); s < plan_.students; s += static_cast<int>(blockDim.x)) {
            const int32_t place[1] = {plan_.row_slot[s]};
            const float x[1] = {mean_[s]};
            float y[1], h[1];
            y_.gather(place, y);
            row_values(place, x, y, 0.0, h);
            mean_[s] = h[0];
        }
        __syncthreads();  // h is there
    }

    // Sums of the teacher's logits, relative to the rows' maxima; returns the mean of the logarithms of their totals,
    // to the base 2.
    __device__ double sum_teacher(const int32_t* chosen, int size, int merged) {
        double log_totals = 0.0;
        for (int i = 0; i < merged; ++i) {
            const AnyRow y(p_.teacher, teacher_row_ + i);
            const Statistics q = statistics(y, chosen, size, p_.lowest, p_.temperature, shared_, Unweighted{});
            log_totals += q.log_total() / merged;
            each_column(y, chosen, size, [&](int j, const auto& x) {
                constexpr int N = sizeof(x) / sizeof(float);
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    const float relative = at_least(x[k], p_.lowest) - q.exp.top;
                    sums_[j + k] = i == 0 ? relative : sums_[j + k] + relative;
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

    // The gradient p_s share (h_s - mean) of row r.
    __device__ void token_gradient(int64_t r, const Row<S>& z, double mean, double share) {
        const Powers<precise>& one = student_;
        const LabelTerm label = label_term(p_.labels, r, z, plan_.students, p_.lowest, shared_, p_.temperature == 1.0f,
                                           one.statistics(p_.lowest, p_.temperature));
        const auto factor = static_cast<float>(share / one.total);
        const bool clamped = one.floor * one.scale > -150.0f;  // the lowest logits have mass
        const auto high = static_cast<float>(mean), low = static_cast<float>(mean - static_cast<double>(high));
        S* grad = row_of<S>(p_.grad, r);
        const Written<S> written(z, grad);
        // That of the token that has more than half of the mass is computed last, by the thread that has met it.
        int peak = -1;
        float peak_z = 0.0f;
        const bool peaked = one.total < 2.0;
        if (peaked && one.place >= 0) {
            for (peak = one.place; z[peak] != one.top;) ++peak;
            peak_z = z[peak];
        }
        float sum = 0.0f, peak_value = 0.0f;
        // x: exponentials, h: h_s - mean
        const auto write = [&](int i, const auto& z, const auto& x, auto& h) {
            constexpr int N = sizeof(x) / sizeof(float);
            if (clamped) {
#pragma unroll
                for (int k = 0; k < N; ++k) h[k] = z[k] < p_.lowest ? 0.0f : h[k];
            }
            float g[N];
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const float own = x[k] * h[k];
                sum += own;
                g[k] = own * factor;
            }
            if (label.label >= 0) {
#pragma unroll
                for (int k = 0; k < N; ++k) g[k] += label(i + k, z[k]);
            }
            if (static_cast<unsigned>(peak - i) < static_cast<unsigned>(N)) {
#pragma unroll
                for (int k = 0; k < N; ++k) peak_value = i + k == peak ? x[k] * h[k] : peak_value;
            }
            written.put(i, g);
        };
        if (merged() > 1) {
            each_pair(z, AnyRow(mean_), plan_.students, [&](int i, const auto& z, const auto& values) {
                constexpr int N = sizeof(z) / sizeof(float);
                float x[N], h[N];
                one.of(z, x);
#pragma unroll
                for (int k = 0; k < N; ++k) h[k] = (values[k] - high) - low;
                write(i, z, x, h);
            });
        } else if (plan_.paired == nullptr) {
            const AnyRow slots(reinterpret_cast<const float*>(plan_.row_slot));
            each_pair(z, slots, plan_.students, [&](int i, const auto& z, const auto& slot) {
                constexpr int N = sizeof(z) / sizeof(float);
                float x[N], h[N];
#pragma unroll
                for (int k = 0; k < N; ++k) h[k] = stored_[-1 - __float_as_int(slot[k])] - high;
                one.of(z, x);
                write(i, z, x, h);
            });
        } else {
            each_partner(z, y_, plan_.row_slot, plan_.students,
                         [&](int i, const auto& z, const auto& place, const auto& y) {
                             float x[sizeof(z) / sizeof(float)], h[sizeof(z) / sizeof(float)];
                             one.of(z, x);
                             row_values(place, x, y, mean, h);
                             write(i, z, x, h);
                         });
        }
        written.fill(plan_.students, p_.grad.width);
        if (!peaked) return;
        double sums[1] = {static_cast<double>(sum) - static_cast<double>(peak_value)};
        block_sum(sums, shared_);
        if (peak < 0) return;
        const double others = sums[0] * static_cast<double>(factor);
        narrow(static_cast<float>(static_cast<double>(label(peak, peak_z)) - others), grad[peak]);
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
            sums[e] += mass(static_cast<int>(plan_.entry_row[e])) * unit * stored_[plan_.entry_column[e]];
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
    AnyRow y_;
    float *stored_, *mean_, *sums_;
    Powers<precise> student_, teacher_;
    double total_ = 0.0, d_ = 0.0, loss_ = 0.0, b_ = 0.0;
    float to_mass_ = 0.0f, small_ = 0.0f;
};

// `ring_bytes` of dynamic shared memory are followed by room for what is stored; 0: the workspace has it.
template <typename S, Merge merge>
__global__ __launch_bounds__(max_threads, 1) void pkl_kernel(const __grid_constant__ PklParams params,
                                                             int32_t ring_bytes) {
    XTOKEN_SHARED(shared, Sums);
    XTOKEN_DYNAMIC_SHARED(char, memory);
    float* workspace = params.workspace + blockIdx.x * Workspace(params.plan, merge).total();
    float* stored = ring_bytes > 0 ? reinterpret_cast<float*>(memory + ring_bytes) : workspace;
    float* weight_sums =
        params.weight_sums == nullptr ? nullptr : params.weight_sums + blockIdx.x * params.plan.entries;
    for (int64_t k = blockIdx.x; k < params.chunks; k += gridDim.x) {
        if (is_left_out(params, k)) continue;
        Chunk<S, merge>(params, k, workspace, stored, shared).run(weight_sums);
        __syncthreads();  // the workspace may be overwritten
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
        const size_t ring = Ring::bytes(3, launch.threads);  // a row, and a table of four bytes an element
        const size_t stored = sizeof(float) * Workspace(params.plan, params.merge).stored;
        const bool fits = ring + stored + sizeof(Sums) <= shared_memory_of_a_block();
        launch_shared("pkl", kernel, fits ? ring + stored : ring, launch, params.chunks, params,
                      static_cast<int32_t>(fits ? ring : 0));
    });
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
const Launcher sums_launcher("sum_blocks", &sum_blocks);

}  // namespace
}  // namespace xtoken::cuda
