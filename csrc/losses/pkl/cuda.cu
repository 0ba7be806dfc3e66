// P-KL of one chunk by one block. The formula is that of xtoken.reference.pkl.
//
// With e the student's exponentials (or, for several tokens, their mean distribution) and Z their sum, x = W^T e, S =
// sum_C x, D = S + eps Z and m = x / D:
//   u_t = +-dL/dm_t,     B = sum_t m_t u_t,     h_s = sum_t W_st (u_t - B)
//   dL/dlogit_s = +-p_s Z / (D temperature) (h_s - sum p h)
// where KL(q || m) has u = q / (m + eps) and the sign -, the others +. For one token sum p h is B eps exactly. The
// passes:
//   1. z: maximum, Z, sum of the pairs' x        2. sums of columns with several entries: S
//   3. y: maximum, sum, columns without entries  4. the other columns that are no pair's: u, loss, B
//   5. z, gathers of y: the pairs' loss and B    6. sums of rows with several entries
//   7. z, gathers of y and of the sums: the gradient
// Only u of the columns that are no pair's and the sums are stored, in shared memory where it has room for them.
//
// Where nearly all mass is on one token, h_s - sum p h cancels there: that token's gradient is set to what makes the
// row's sum zero.
#include "cuda/chunks.cuh"
#include "cuda/divergence.cuh"
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
    // u, a zero, and the sums of the columns with several entries and z of the rows without a pair; then, in the place
    // of these, the sums of the rows with several entries
    int64_t stored;
    int64_t mean;     // the mean distribution of a chunk of several tokens, then its h
    int64_t teacher;  // sums of the teacher's logits over the chunk

    __host__ __device__ Workspace(const PklPlan& plan, Merge merge, int64_t element_size)
        : stored(whole(
              int64_t{1} + plan.columns +
              max(plan.column_lists.count + int64_t{1} + plan.rest * element_size / 4, int64_t{plan.row_lists.count}))),
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
    bool clamped;                    // whether the lowest logits have mass, so that the maximum is needed
    // sums of powers, of weight * power, and of weight * power * exponent; all without shift
    double total, weighted, entropy;
    int place;  // of the vector with the largest element; -1: another thread's

    __device__ Powers(float lowest, float temperature)
        : scale((precise ? 1.0f : log2_e) / temperature), shift(0.0f), place(-1) {
        set_top(lowest, lowest);
    }
    Powers() = default;
    __device__ void set_top(float x, float lowest) {
        top = x;
        floor = lowest - x;
        clamped = floor * scale > -150.0f;
    }
    __device__ float exponent(float x) const { return fmaf(largest(x - top, floor), scale, -shift); }
    __device__ float power(float x) const { return power_of(exponent(x)); }
    template <int N>
    __device__ void of(const float (&x)[N], float (&e)[N]) const {
#pragma unroll
        for (int k = 0; k < N; ++k) e[k] = x[k] - top;
        if (__builtin_expect(static_cast<long>(clamped), 0L)) {
#pragma unroll
            for (int k = 0; k < N; ++k) e[k] = largest(e[k], floor);
        }
#pragma unroll
        for (int k = 0; k < N; ++k) e[k] = power_of(fmaf(e[k], scale, -shift));
    }
    // As rows.cuh has it.
    __device__ Statistics statistics(float lowest, float temperature) const {
        return {{precise, top, lowest, 1.0f / temperature}, total, weighted};
    }
};

// One pass over (the chosen elements of) a row, see `statistics`: what a thread adds up, then the sums over the block.
template <bool precise, bool with_entropy>
class PowersOf {
  public:
    __device__ PowersOf(float lowest, float temperature) : lowest_(lowest), p_(lowest, temperature) {}

    template <typename R, typename Weights>
    __device__ void add(const R& row, const int32_t* chosen, int size, const Weights& weights) {
        each_column(row, chosen, size, [&](int i, const auto& x) {
            constexpr int N = sizeof(x) / sizeof(float);
            const auto weight = weights.template of<N>(i);
            float e[N];
            float top = x[0];
#pragma unroll
            for (int k = 1; k < N; ++k) top = fmaxf(top, x[k]);
            if (top > p_.top) {
                p_.place = i;
                rescale(top);
            }
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const float exponent = largest(x[k] - p_.top, p_.floor) * p_.scale;
                e[k] = p_.power_of(exponent);
                if constexpr (with_entropy) entropy_ = weight.add(k, e[k] * exponent, entropy_);
            }
#pragma unroll
            for (int k = 0; k < N; ++k) {
                total_ += e[k];
                weighted_ = weight.add(k, e[k], weighted_);
            }
        });
    }

    __device__ Powers<precise> sums(Sums& shared) {
        const float top = block_max(p_.top, shared);
        if (p_.top < top) p_.place = -1;
        rescale(top);
        double sums[3] = {static_cast<double>(total_), static_cast<double>(weighted_), static_cast<double>(entropy_)};
        block_sum(sums, shared);
        p_.total = sums[0];
        p_.weighted = sums[1];
        p_.entropy = sums[2];
        return p_;
    }

  private:
    __device__ void rescale(float top) {
        const float fall = (p_.top - top) * p_.scale, shrink = p_.power_of(fall);
        if constexpr (with_entropy) entropy_ = shrink * fmaf(fall, weighted_, entropy_);
        total_ *= shrink;
        weighted_ *= shrink;
        p_.set_top(top, lowest_);
    }

    float lowest_;
    Powers<precise> p_;
    float total_ = 0.0f, weighted_ = 0.0f, entropy_ = 0.0f;
};

// Weights 0 and 1, eight flags a byte.
struct Flags {
    const uint8_t* bytes;  // null: zeros

    struct Bits {
        unsigned bits;
        __device__ bool operator[](int k) const { return (bits & 1u << k) != 0; }
        __device__ float add(int k, float x, float sum) const { return (*this)[k] ? sum + x : sum; }
    };
    // Of elements i ... i + N - 1.
    template <int N>
    __device__ Bits of(int i) const {
        static_assert(N <= 8, "of two bytes");
        return {bytes == nullptr ? 0 : (bytes[i / 8] | unsigned{bytes[i / 8 + 1]} << 8) >> (i % 8)};
    }
};

// Weights that are in memory.
struct Numbers {
    const float* numbers;

    template <int N>
    struct Some {
        float weight[N];
        __device__ float add(int k, float x, float sum) const { return fmaf(weight[k], x, sum); }
    };
    template <int N>
    __device__ Some<N> of(int i) const {
        Some<N> some;
        load_lanes(numbers, i, some.weight);
        return some;
    }
};

// Sums of value(index) over lists, into end[-1 - list]. Returns the sum of those that this thread writes. `together`:
// short lists of a thread at a time.
template <int together, typename Value>
__device__ float sum_lists(const SumLists& lists, float* end, Value value) {
    float written = 0.0f;
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int lane = thread % warp_size, long_lists = lists.count - lists.few;
    const auto is_wanted = [&](int list) { return lists.wanted == nullptr || lists.wanted[list] != 0; };
    for (int slice = thread / warp_size; slice < lists.slices; slice += threads / warp_size) {
        const bool is_shared = slice < lists.shared;
        const int list = is_shared ? slice : lists.shared + (slice - lists.shared) * warp_size + lane;
        const bool wanted = list < long_lists && is_wanted(list);
        const int begin = lists.start[slice], behind = wanted ? lists.start[slice + 1] : begin;
        float total = 0.0f;
#pragma unroll 4
        for (int i = begin; i < behind; ++i) {
            const int at = i * warp_size + lane;
            total = fmaf(lists.weight[at], value(lists.index[at]), total);
        }
        if (is_shared) {
            for (int step = warp_size / 2; step > 0; step /= 2) total += __shfl_xor_sync(all_lanes, total, step);
        }
        if (wanted && (!is_shared || lane == 0)) {
            end[-1 - list] = total;
            written += total;
        }
    }
    constexpr int lanes = 4;
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
            end[-1 - (long_lists + first + n * threads)] = total[n];
            written += total[n];
        }
    }
    return written;
}

// Of a block. What all threads know of a chunk and seldom use is here, and not in their registers.
struct Shared {
    Sums sums;
    double total, d;                     // Z (1 for a mean), D
    double lift, log_total;              // of q and m, of the teacher's powers; see `columns`
    double empty_weight, empty_entropy;  // the teacher's powers of columns without entries
};

template <typename S, Merge merge, bool is_mixed>
class Chunk {
  public:
    // `workspace` and `stored`: see Workspace.
    __device__ Chunk(const PklParams& p, const int64_t& k, float* workspace, float* stored, Shared& shared)
        : p_(p),
          plan_(p.plan),
          columns_(p.plan.count == nullptr ? p.plan.columns : *p.plan.count),
          shared_(shared),
          k_(k),
          z_(p.student, row()),
          y_(p.teacher, p.teacher_rows.start[k]),
          workspace_(workspace),
          stored_end_(in_register(stored + Workspace(p.plan, merge, sizeof(S)).stored)) {
        rest_ = reinterpret_cast<S*>(stored);
    }

    __device__ void run() {
        const int thread = static_cast<int>(threadIdx.x);
        if (thread == 0) stored(plan_.columns) = 0.0f;
        masses();
        double student = 0.0, teacher = 0.0;
        if constexpr (merge == Merge::chain) {
            student = later_log_probability<Row<S>>(p_.student, p_.student_rows, row(), count(p_.student_rows));
            teacher = later_log_probability<AnyRow>(p_.teacher, p_.teacher_rows, p_.teacher_rows.start[k_],
                                                    count(p_.teacher_rows));
        }
        columns(student, teacher);

        double loss = loss_, factor = 1.0, later_factor = 0.0;
        if constexpr (is_mixed) {
            factor = ::exp(student);
            later_factor = factor * later_slope_;
        } else if constexpr (merge == Merge::chain) {
            const double c = ::exp(p_.reverse ? student : teacher);
            loss = c * (loss + (p_.reverse ? student - teacher : teacher - student));
            factor = c;
            later_factor = p_.reverse ? loss + c : -c;
        }
        const double temperature = static_cast<double>(p_.temperature), square = temperature * temperature;
        if (thread == 0) p_.losses[k_] = static_cast<float>(loss * square);
        const double scale = (p_.scale == nullptr ? 1.0 : static_cast<double>(p_.scale[k_])) * square;
        const double unit = scale * factor * (p_.reverse || is_mixed ? 1.0 : -1.0) / shared_.d;
        const auto b = static_cast<float>(b_), b_rest = static_cast<float>(b_ - static_cast<double>(b));
        for (int n = thread; n < columns_; n += static_cast<int>(blockDim.x)) stored(n) = (stored(n) - b) - b_rest;
        // For one row sum p h is B eps, which is lost in the rounding of all but 0.
        const double mean = b_ * static_cast<double>(p_.epsilon);
        if (thread == 0 && merged() == 1) stored(plan_.columns) = static_cast<float>(-mean);
        __syncthreads();  // u is relative to B now
        if (p_.weight_sums != nullptr) add_weight_gradient(static_cast<float>(unit));
        if (p_.grad.data == nullptr) {
            for (int64_t r = row(); r < row() + count(p_.student_rows); ++r) {
                label_term(p_.labels, r, Row<S>(p_.student, r), plan_.students, p_.lowest, shared_.sums);
            }
            return;
        }
        sum_lists<lists_together>(plan_.row_lists, end_of_sums(), [&](int n) { return stored_end_[n]; });
        __syncthreads();  // the rows' sums are there
        const double share = unit * shared_.total / (temperature * merged());
        if (merged() == 1) {
            token_gradient(row(), z_, mean, share);
        } else {
            mean_values();
            for (int64_t r = row(); r < row() + merged(); ++r) {
                const Row<S> z(p_.student, r);
                student_ = student_powers(z, Numbers{mean_distribution()});
                token_gradient(r, z, student_.weighted / student_.total, share);
            }
        }
        if constexpr (merge == Merge::chain) {
            const auto later = static_cast<float>(scale * later_factor / temperature);
            for (int64_t r = row() + 1; r < row() + count(p_.student_rows); ++r) later_gradient(r, later);
        }
    }

  private:
    static constexpr bool precise = sizeof(S) == 4;
    static constexpr double unit = Powers<precise>::unit;
    static constexpr int lists_together = is_mixed ? 1 : 2;  // as many as the registers allow

    // What a thread adds up over columns; some lack a factor that all terms share.
    struct Parts {
        float loss = 0.0f, b = 0.0f;
        // of mixed divergences: the student's part of the loss, and what d loss / d log c_S is made of
        float student = 0.0f, slopes = 0.0f, shares = 0.0f;
    };

    // Of u, the zero, and the sums: backwards, so that the negative numbers of `row_slot` are indices.
    __device__ float& stored(int n) const { return stored_end_[-1 - n]; }
    __device__ float* end_of_sums() const { return stored_end_ - plan_.columns - 1; }

    // Where the chunk's rows begin, and how many there are; asked for anew each time, since registers are scarce.
    __device__ int64_t row() const { return p_.student_rows.start[k_]; }
    __device__ int count(const ChunkRows& rows) const {
        return merge == Merge::first ? 1 : static_cast<int>(rows.count[k_]);
    }

    // Of the workspace.
    __device__ float* mean_distribution() const { return workspace_ + Workspace(plan_, merge, sizeof(S)).stored; }
    __device__ float* teacher_sums() const { return mean_distribution() + Workspace(plan_, merge, sizeof(S)).mean; }

    // Rows whose distributions are averaged.
    __device__ int merged() const { return merge == Merge::mean ? count(p_.student_rows) : 1; }

    // e_s
    __device__ float mass(int s) const { return merged() > 1 ? mean_distribution()[s] : student_.power(z_[s]); }

    template <typename Weights>
    __device__ Powers<precise> student_powers(const Row<S>& z, const Weights& weights) {
        PowersOf<precise, false> powers(p_.lowest, p_.temperature);
        powers.add(z, nullptr, plan_.students, weights);
        return powers.sums(shared_.sums);
    }

    // Rows of the teacher whose distributions are averaged.
    __device__ int teacher_merged() const { return merge == Merge::mean ? count(p_.teacher_rows) : 1; }

    // e, Z, the sums of columns, S and D; and the teacher's powers, unless there are several rows to average.
    __device__ void masses() {
        const Flags paired{plan_.paired};
        double total = 1.0, own;  // S without the columns that are stored
        if (merged() == 1) {
            PowersOf<precise, false> powers(p_.lowest, p_.temperature);
            powers.add(z_, nullptr, plan_.students, paired);
            copy_rest();
            student_ = powers.sums(shared_.sums);  // the copies are there, too
            total = student_.total;
            own = student_.weighted;
        } else {
            for (int i = 0; i < merged(); ++i) {
                const Row<S> z(p_.student, row() + i);
                // its barriers also separate the additions to `mean` of one row from those of the next
                const Statistics one = row_statistics(z, plan_.students, p_.lowest, p_.temperature, shared_.sums);
                const auto share = static_cast<float>(1.0 / (one.total * merged()));
                each_vector(z, plan_.students, [&](int s, const auto& x) {
                    constexpr int N = sizeof(x) / sizeof(float);
#pragma unroll
                    for (int k = 0; k < N; ++k) {
                        const float p = one.exp(x[k]) * share;
                        mean_distribution()[s + k] = i == 0 ? p : mean_distribution()[s + k] + p;
                    }
                });
            }
            __syncthreads();  // the mean is there
            float sum = 0.0f;
            for (int s = static_cast<int>(threadIdx.x); s < plan_.students; s += static_cast<int>(blockDim.x)) {
                sum = paired.template of<1>(s).add(0, mean_distribution()[s], sum);
            }
            double sums[1] = {static_cast<double>(sum)};
            block_sum(sums, shared_.sums);
            own = sums[0];
        }
        const auto value = [&](int i) {
            if (plan_.unpaired == nullptr) return mass(i);
            return merged() > 1 ? mean_distribution()[plan_.unpaired[i]] : student_.power(widen(rest_[i]));
        };
        // Sums wait for memory, the pass over the teacher's row does not: half of the warps begin with each.
        float sum = 0.0f;
        PowersOf<precise, true> teacher(p_.lowest, p_.temperature);
        const int warp = static_cast<int>(threadIdx.x) / warp_size;
#pragma unroll 1
        for (int turn = 0; turn < 2; ++turn) {
            if ((warp + turn) % 2 == 0) {
                sum = sum_lists<lists_together>(plan_.column_lists, end_of_sums(), value);
            } else if (teacher_merged() == 1) {
                teacher.add(y_, chosen(), size(), Flags{plan_.empty});
            }
        }
        if (plan_.empty == nullptr) {
            for (int n = static_cast<int>(threadIdx.x); n < columns_; n += static_cast<int>(blockDim.x)) {
                if (plan_.column_slot[n] < plan_.students) sum += mass(plan_.column_slot[n]);
            }
        }
        double sums[1] = {static_cast<double>(sum)};
        block_sum(sums, shared_.sums);  // the columns' sums are there, too
        if (threadIdx.x == 0) {
            shared_.total = total;
            shared_.d = own + sums[0] + static_cast<double>(p_.epsilon) * total;
        }
        if (teacher_merged() == 1) finish_teacher(teacher);
    }

    __device__ void finish_teacher(PowersOf<precise, true>& powers) {
        teacher_ = powers.sums(shared_.sums);
        if (threadIdx.x == 0) {
            shared_.empty_weight = teacher_.weighted;
            shared_.empty_entropy = teacher_.entropy;
        }
    }

    // z of the rows without a pair, close together for the sums of columns.
    __device__ void copy_rest() {
        const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
        constexpr int N = 8;  // loads in flight
        for (int first = thread; first < plan_.rest; first += N * threads) {
            int32_t from[N];
            S z[N];
#pragma unroll
            for (int k = 0; k < N; ++k)
                from[k] = first + k * threads < plan_.rest ? plan_.unpaired[first + k * threads] : 0;
#pragma unroll
            for (int k = 0; k < N; ++k) z[k] = z_.data[from[k]];
#pragma unroll
            for (int k = 0; k < N; ++k) {
                if (first + k * threads < plan_.rest) rest_[first + k * threads] = z[k];
            }
        }
    }

    // C: all columns, or those that are stored.
    __device__ const int32_t* chosen() const { return plan_.empty != nullptr ? nullptr : plan_.stored; }
    __device__ int size() const { return plan_.empty != nullptr ? plan_.teachers : columns_; }

    // u of the columns that are stored, the loss and B. Mixed divergences are those of c_T q and c_S m, given log c_S
    // and log c_T.
    __device__ void columns(double student, double teacher) {
        const int merged = teacher_merged();
        const bool all = plan_.empty != nullptr;
        const Flags empty{plan_.empty};
        double log_total;  // of the teacher's powers, to their base
        if (merged == 1) {
            log_total = ::log(teacher_.total) / unit;
        } else {
            log_total = sum_teacher(merged) / unit;
            y_ = AnyRow(teacher_sums());
            PowersOf<precise, true> powers(-1e30f, p_.temperature * merged);  // sums of logits are finite
            powers.add(y_, nullptr, size(), empty);
            finish_teacher(powers);
            log_total -= static_cast<double>(teacher_.top) * static_cast<double>(teacher_.scale);
        }
        // Exponents of q: the whole part of log_total is taken off, the rest multiplies q and m.
        const double whole_part = ::rint(log_total), lift = ::exp((log_total - whole_part) * unit);
        teacher_.shift = static_cast<float>(whole_part);
        if (threadIdx.x == 0) {
            shared_.lift = lift;
            shared_.log_total = log_total;
        }
        __syncthreads();  // these and D are there
        to_mass_ = static_cast<float>(lift / shared_.d);
        small_ = static_cast<float>(lift * static_cast<double>(p_.epsilon));

        later_ = static_cast<float>(teacher - student);
        Parts parts;
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
                x[k] = slot[k] < plan_.students ? mass(slot[k]) : stored(plan_.columns + slot[k] - plan_.students);
            }
            slopes(place, x, y, u, parts);
#pragma unroll
            for (int k = 0; k < N; ++k) {
                if (first + k * threads < columns_) stored(first + k * threads) = u[k];
            }
        }
        if (plan_.paired != nullptr) {
            const bool averaged = this->merged() > 1;
            each_partner(z_, y_, plan_.row_slot, plan_.students,
                         [&](int i, const auto& z, const auto& place, const auto& y) {
                             float x[sizeof(z) / sizeof(float)], u[sizeof(z) / sizeof(float)];
                             masses_of(averaged, i, z, x);
                             slopes(place, x, y, u, parts);
                         });
        }
        if (is_mixed && all) {  // the columns without entries
            each_vector(y_, size(), [&](int i, const auto& y) {
                constexpr int M = sizeof(y) / sizeof(float);
                int32_t place[M];
                float x[M], u[M];
                const Flags::Bits is_empty = empty.template of<M>(i);
#pragma unroll
                for (int k = 0; k < M; ++k) {
                    place[k] = is_empty[k] ? 0 : -1;
                    x[k] = 0.0f;
                }
                slopes(place, x, y, u, parts);
            });
        }
        double loss = static_cast<double>(parts.loss) / (p_.reverse ? shared_.d : shared_.lift), slope = 0.0;
        if constexpr (is_mixed) {
            const double pulled = p_.divergence.teacher * (1.0 - p_.divergence.mixture);
            loss = ::exp(teacher) * loss + ::exp(student) * static_cast<double>(parts.student) / shared_.d;
            slope = static_cast<double>(parts.slopes) / shared_.d -
                    pulled * static_cast<double>(p_.epsilon) * static_cast<double>(parts.shares);
        } else {
            loss *= unit;
        }
        double sums[3] = {loss, static_cast<double>(parts.b), slope};
        block_sum(sums, shared_.sums);
        loss_ = size() > 0 ? sums[0] : static_cast<double>(nanf(""));
        if (!p_.reverse && !is_mixed) {  // of the columns without entries, where m is 0
            const double log_total = shared_.log_total;
            const double distance = log_total + ::log(static_cast<double>(p_.epsilon)) / unit;
            loss_ += unit * ::exp(-log_total * unit) * (shared_.empty_entropy - shared_.empty_weight * distance);
        }
        b_ = sums[1] / shared_.d;
        later_slope_ = sums[2];
    }

    // e_s of rows s = i ... i + N - 1, whose logits are z.
    template <int N>
    __device__ void masses_of(bool averaged, int i, const float (&z)[N], float (&x)[N]) const {
        if (averaged) {
            load_lanes(mean_distribution(), i, x);
        } else {
            student_.of(z, x);
        }
    }

    // u of columns with these x and logits y of the teacher, at `place` (negative: no column).
    template <int N>
    __device__ void slopes(const int32_t (&place)[N], const float (&x)[N], const float (&y)[N], float (&u)[N],
                           Parts& parts) const {
        if constexpr (is_mixed) return mixed_slopes(place, x, y, u, parts);
        if (p_.reverse) {
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const float e = place[k] < 0 ? 0.0f : x[k], m = e * to_mass_, added = m + small_;
                const float difference = teacher_.log(added) - teacher_.exponent(y[k]);
                u[k] = fmaf(difference, static_cast<float>(unit), quotient(m, added, precise));
                parts.loss = fmaf(e, difference, parts.loss);
                parts.b = fmaf(e, u[k], parts.b);
            }
        } else {
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const float exponent = teacher_.exponent(y[k]);
                const float q = place[k] < 0 ? 0.0f : teacher_.power_of(exponent), added = fmaf(x[k], to_mass_, small_);
                u[k] = quotient(q, added, precise);
                parts.loss = fmaf(q, exponent - teacher_.log(added), parts.loss);
                parts.b = fmaf(x[k], u[k], parts.b);
            }
        }
    }

    template <int N>
    __device__ void mixed_slopes(const int32_t (&place)[N], const float (&x)[N], const float (&y)[N], float (&u)[N],
                                 Parts& parts) const {
        const MixedDivergence divergence(p_.divergence, precise);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            const bool inside = place[k] >= 0;
            const float exponent = teacher_.exponent(y[k]), e = inside ? x[k] : 0.0f;
            const float m = e * to_mass_, added = m + small_;
            const float difference = (exponent - teacher_.log(added)) * static_cast<float>(unit);
            const MixedDivergence::Terms terms = divergence(difference + later_);
            u[k] = divergence.slope(terms, quotient(m, added, precise));
            parts.loss = fmaf(inside ? teacher_.power_of(exponent) : 0.0f, terms.of_teacher, parts.loss);
            parts.student = fmaf(e, terms.of_student, parts.student);
            parts.b = fmaf(e, u[k], parts.b);
            if constexpr (merge == Merge::chain) {
                parts.slopes = fmaf(e, divergence.slope(terms), parts.slopes);
                parts.shares += inside ? terms.share : 0.0f;
            }
        }
    }

    // h - mean of rows of which `place` is the slot, or the column of a pair with these x and y.
    template <int N>
    __device__ void row_values(const int32_t (&place)[N], const float (&x)[N], const float (&y)[N], double mean,
                               float (&h)[N]) const {
        const auto all = static_cast<float>(b_ + mean), rest = static_cast<float>(b_ + mean - static_cast<double>(all));
        float u[N];
        if (p_.reverse || is_mixed) {
            Parts unused;
            slopes(place, x, y, u, unused);
        } else {  // the same without what is not needed
            teacher_.of(y, u);
#pragma unroll
            for (int k = 0; k < N; ++k) u[k] = quotient(u[k], fmaf(x[k], to_mass_, small_), precise);
        }
#pragma unroll
        for (int k = 0; k < N; ++k) {
            h[k] = place[k] < 0 ? stored_end_[place[k]] : (u[k] - all) - rest;
        }
    }

    // h in the place of the mean distribution.
    __device__ void mean_values() {
        __syncthreads();  // gradients of W have been added
        for (int s = static_cast<int>(threadIdx.x); s < plan_.students; s += static_cast<int>(blockDim.x)) {
            const int32_t place[1] = {plan_.row_slot[s]};
            const float x[1] = {mean_distribution()[s]};
            float y[1], h[1];
            y_.gather(place, y);
            row_values(place, x, y, 0.0, h);
            mean_distribution()[s] = h[0];
        }
        __syncthreads();  // h is there
    }

    // Sums of the teacher's logits, relative to the rows' maxima; returns the mean of the logarithms of their totals,
    // to the base 2.
    __device__ double sum_teacher(int merged) {
        double log_totals = 0.0;
        for (int i = 0; i < merged; ++i) {
            const AnyRow y(p_.teacher, p_.teacher_rows.start[k_] + i);
            const Statistics q = statistics(y, chosen(), size(), p_.lowest, p_.temperature, shared_.sums, Unweighted{});
            log_totals += q.log_total() / merged;
            each_column(y, chosen(), size(), [&](int j, const auto& x) {
                constexpr int N = sizeof(x) / sizeof(float);
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    const float relative = at_least(x[k], p_.lowest) - q.exp.top;
                    teacher_sums()[j + k] = i == 0 ? relative : teacher_sums()[j + k] + relative;
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
            const Statistics all = row_statistics(z, logits.width, p_.lowest, p_.temperature, shared_.sums);
            result += all.log_share(z[static_cast<int>(rows.next[r])]);
        }
        return result;
    }

    // The gradient p_s share (h_s - mean) of row r.
    __device__ void token_gradient(int64_t r, const Row<S>& z, double mean, double share) {
        const Powers<precise>& one = student_;
        const LabelTerm label = label_term(p_.labels, r, z, plan_.students, p_.lowest, shared_.sums,
                                           p_.temperature == 1.0f, one.statistics(p_.lowest, p_.temperature));
        const auto factor = static_cast<float>(share / one.total);
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
        float others = 0.0f;
        // x: exponentials, h: h_s - mean
        const auto write = [&](int i, const auto& z, const auto& x, auto& h) {
            constexpr int N = sizeof(x) / sizeof(float);
            if (__builtin_expect(static_cast<long>(one.clamped), 0L)) {
#pragma unroll
                for (int k = 0; k < N; ++k) h[k] = z[k] < p_.lowest ? 0.0f : h[k];
            }
            float g[N];
#pragma unroll
            for (int k = 0; k < N; ++k) g[k] = (x[k] * h[k]) * factor;
            if (peaked) {
#pragma unroll
                for (int k = 0; k < N; ++k) others += i + k == peak ? 0.0f : g[k];
            }
            label.add(i, z, g);
            written.put(i, g);
        };
        if (merged() > 1) {
            each_pair(z, AnyRow(mean_distribution()), plan_.students, [&](int i, const auto& z, const auto& values) {
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
                for (int k = 0; k < N; ++k) h[k] = stored_end_[__float_as_int(slot[k])];
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
        double sums[1] = {static_cast<double>(others)};
        block_sum(sums, shared_.sums);
        if (peak >= 0) narrow(static_cast<float>(static_cast<double>(label(peak, peak_z)) - sums[0]), grad[peak]);
    }

    // A later row under merge="chain": factor * (onehot - softmax).
    __device__ void later_gradient(int64_t r, float factor) {
        const Row<S> z(p_.student, r);
        const Statistics all = row_statistics(z, plan_.students, p_.lowest, p_.temperature, shared_.sums);
        const LabelTerm label =
            label_term(p_.labels, r, z, plan_.students, p_.lowest, shared_.sums, p_.temperature == 1.0f, all);
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
    __device__ void add_weight_gradient(float unit) {
        float* sums = p_.weight_sums + blockIdx.x * plan_.entries;
        for (int64_t e = threadIdx.x; e < plan_.entries; e += blockDim.x) {
            sums[e] +=
                mass(static_cast<int>(plan_.entry_row[e])) * unit * stored(static_cast<int>(plan_.entry_column[e]));
        }
    }

    const PklParams& p_;
    const PklPlan& plan_;
    int columns_;
    Shared& shared_;
    const int64_t& k_;
    Row<S> z_;
    AnyRow y_;
    float *workspace_, *stored_end_;
    S* rest_;
    Powers<precise> student_, teacher_;
    double loss_ = 0.0, b_ = 0.0;
    double later_slope_ = 0.0;                            // of mixed divergences: dL / d log c_S, divided by c_S
    float to_mass_ = 0.0f, small_ = 0.0f, later_ = 0.0f;  // m = to_mass x, both as small (epsilon) times `lift`
};

// `ring_bytes` of dynamic shared memory are followed by room for what is stored; 0: the workspace has it.
template <typename S, Merge merge, bool is_mixed>
__global__ __launch_bounds__(max_threads, 1) void pkl_kernel(const __grid_constant__ PklParams params,
                                                             int32_t ring_bytes) {
    XTOKEN_SHARED(shared, Shared);
    XTOKEN_DYNAMIC_SHARED(char, memory);
    float* workspace = params.workspace + blockIdx.x * Workspace(params.plan, merge, sizeof(S)).total();
    float* stored = ring_bytes > 0 ? reinterpret_cast<float*>(memory + ring_bytes) : workspace;
    each_chunk(params,
               [&](const int64_t& k) { Chunk<S, merge, is_mixed>(params, k, workspace, stored, shared).run(); });
}

__global__ void sum_blocks_kernel(const float* sums, int32_t blocks, int64_t entries, float* out) {
    for (int64_t e = blockIdx.x * blockDim.x + threadIdx.x; e < entries; e += gridDim.x * blockDim.x) {
        double total = 0.0;
        for (int b = 0; b < blocks; ++b) total += static_cast<double>(sums[b * entries + e]);
        out[e] = static_cast<float>(total);
    }
}

int64_t workspace_of(const PklParams& params) {
    return Workspace(params.plan, params.merge, element_size(params.student.type)).total();
}

// Each chunk by one block; rows of the gradient that belong to no chunk are not touched. Losses are nan for a set of no
// column.
void pkl(const PklParams& params, const Launch& launch) {
    typed(params.student.type, [&](const auto* s) {
        using S = std::remove_const_t<std::remove_pointer_t<decltype(s)>>;
        const auto chosen = [&](auto mixed) {
            constexpr bool is_mixed = decltype(mixed)::value;
            auto* kernel = pkl_kernel<S, Merge::first, is_mixed>;
            if (params.merge == Merge::mean) kernel = pkl_kernel<S, Merge::mean, is_mixed>;
            if (params.merge == Merge::chain) kernel = pkl_kernel<S, Merge::chain, is_mixed>;
            return kernel;
        };
        auto* kernel = params.divergence.is_mixed() ? chosen(std::true_type{}) : chosen(std::false_type{});
        const size_t ring = Ring::bytes(3, launch.threads);  // a row, and a table of four bytes an element
        const size_t stored = sizeof(float) * Workspace(params.plan, params.merge, sizeof(S)).stored;
        const bool fits = ring + stored + sizeof(Shared) + queue_bytes <= shared_memory_of_a_block();
        launch_chunks("pkl", kernel, fits ? ring + stored : ring, launch, params,
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
