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
    bool clamped;                    // whether the lowest logits have mass, or `QuickPowers` would overflow

    __device__ Powers(float lowest, float temperature) : scale((precise ? 1.0f : log2_e) / temperature), shift(0.0f) {
        set_top(lowest, lowest);
    }
    Powers() = default;
    __device__ void set_top(float x, float lowest) {
        top = x;
        floor = lowest - x;
        clamped = floor * scale > -150.0f || fabsf(x * scale) > 0x1p29f;
    }
    __device__ float exponent(float x) const { return fmaf(largest(x - top, floor), scale, -shift); }
    __device__ float power(float x) const { return power_of(exponent(x)); }
    template <bool may_be_clamped, int N>
    __device__ void of(const float (&x)[N], float (&e)[N]) const {
#pragma unroll
        for (int k = 0; k < N; ++k) e[k] = power_of(may_be_clamped ? exponent(x[k]) : fmaf(x[k] - top, scale, -shift));
    }
};

// Sums of powers, of weight * power, and of power * exponent, all without shift.
template <bool precise>
struct PowerSums {
    Powers<precise> powers;
    double total, weighted, entropy;
    int place;  // of the largest element; -1: another thread's
};

// The powers of a row whose lowest logits have no mass, an instruction less each: all are divided by one `factor` near
// 1, the rounding of `offset`, so that that of the largest element is not exactly a power of the shift.
template <bool precise>
struct QuickPowers {
    float scale, offset;
    double factor;

    explicit __device__ QuickPowers(const Powers<precise>& p) : scale(p.scale) {
        const double exact = static_cast<double>(p.top) * static_cast<double>(scale) + static_cast<double>(p.shift);
        offset = static_cast<float>(exact);
        const double x = (static_cast<double>(offset) - exact) * Powers<precise>::unit;
        factor = 1.0 + x * (1.0 + 0.5 * x);  // e^x: x is at most 2^-25 of the offset
    }
    __device__ float power(float x) const { return Powers<precise>::power_of(fmaf(x, scale, -offset)); }
    template <int N>
    __device__ void of(const float (&x)[N], float (&e)[N]) const {
#pragma unroll
        for (int k = 0; k < N; ++k) e[k] = power(x[k]);
    }
};

// Whether weights are 0 and 1, in a BitRow.
template <typename Weights>
constexpr bool is_bits = false;
template <bool ahead>
constexpr bool is_bits<BitRow<ahead>> = true;

// One pass over (the chosen elements of) a row: what a thread adds up, relative to the largest element of one of its
// vectors, then the sums over the block. The student's row (not `with_entropy`) is scanned for its largest element too,
// and its lowest logits are left out, since that is seldom wrong: `clamped_sums`. `quick`: an exponent is one product
// and difference to the rounded offset of the largest element, whose power, found by the same instruction, the sums of
// the block are divided by, so that of one element alone the sum is 1.
template <bool precise, bool with_entropy, bool quick>
class PowersOf {
  public:
    __device__ PowersOf(float lowest, float temperature)
        : lowest_(lowest), p_(lowest, temperature), scale_(p_.scale), offset_(__fmul_rn(lowest, p_.scale)) {}

    template <typename R, typename Weights>
    __device__ void add(const R& row, const int32_t* chosen, int size, const Weights& weights) {
        each_weighted(row, chosen, size, weights, [&](int i, const auto& x, const auto& weight) {
            constexpr int N = sizeof(x) / sizeof(float);
            float e[N], exponent[N];
            float sum = powers<with_entropy>(x, exponent, e);
            if (sum > most) {
                float top = x[0];
#pragma unroll
                for (int k = 1; k < N; ++k) top = fmaxf(top, x[k]);
                rescale(fmaxf(top, p_.top));
                sum = powers<with_entropy>(x, exponent, e);
            }
            if constexpr (!with_entropy) {  // where one token has more than half of the mass, its vector has
                if (sum > largest_) place_ = N == 1 ? -2 - i : i;
                largest_ = fmaxf(largest_, sum);
            }
            add_powers(exponent, e, sum, weight);
        });
    }

    // `row`: that of `add`, without a choice.
    template <typename R>
    __device__ PowerSums<precise> sums(const R& row, Sums& shared) {
        float top = p_.top;
        const bool alone = place_ < -1;
        const int first = alone ? -2 - place_ : place_, behind = first < 0 ? first : first + (alone ? 1 : R::vector);
        place_ = -1;
        for (int i = first; i < behind; ++i) {
            if (row[i] < top) continue;
            top = row[i];
            place_ = i;
        }
        const float top_of_block = block_max(top, shared);
        if (top < top_of_block) place_ = -1;
        rescale(top_of_block);
        return over_block(shared);
    }
    __device__ PowerSums<precise> sums(Sums& shared) {
        rescale(block_max(p_.top, shared));
        return over_block(shared);
    }

    // The sums of a row whose lowest logits have mass, after `sums`.
    template <typename R, typename Weights>
    __device__ PowerSums<precise> clamped_sums(const R& row, int size, const Weights& weights, Sums& shared) {
        total_ = weighted_ = 0.0f;
        each_weighted(row, nullptr, size, weights, [&](int, const auto& x, const auto& weight) {
            constexpr int N = sizeof(x) / sizeof(float);
            float e[N], exponent[N];
            const float sum = powers<true>(x, exponent, e);
            add_powers(exponent, e, sum, weight);
        });
        return over_block(shared);
    }

  private:
    static constexpr float most = 0x1p10f;  // sum of a vector that another top has to be taken for

    // Exponents and powers of some elements; returns the sum of these.
    template <bool may_be_clamped, int N>
    __device__ float powers(const float (&x)[N], float (&exponent)[N], float (&e)[N]) const {
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < N; ++k) {
            exponent[k] = quick ? fmaf(may_be_clamped ? at_least(x[k], lowest_) : x[k], p_.scale, -offset_)
                                : (may_be_clamped ? largest(x[k] - p_.top, p_.floor) : x[k] - p_.top) * p_.scale;
            e[k] = p_.power_of(exponent[k]);
            sum = k == 0 ? e[k] : sum + e[k];
        }
        return sum;
    }
    // body(i, x, weight); bits are copied beside the row, which is all of it.
    template <typename R, typename Weights, typename Body>
    __device__ static void each_weighted(const R& row, const int32_t* chosen, int size, const Weights& weights,
                                         Body body) {
        if constexpr (is_bits<Weights>) {
            each_pair(row, weights, size, body);
        } else {
            each_column(row, chosen, size,
                        [&](int i, const auto& x) { body(i, x, weights.template of<sizeof(x) / sizeof(float)>(i)); });
        }
    }
    template <int N, typename Weight>
    __device__ void add_powers(const float (&exponent)[N], const float (&e)[N], float sum, const Weight& weight) {
        total_ += sum;
#pragma unroll
        for (int k = 0; k < N; ++k) {
            weighted_ = weight.add(k, e[k], weighted_);
            if constexpr (with_entropy) entropy_ = fmaf(e[k], exponent[k], entropy_);
        }
    }
    __device__ void rescale(float top) {
        if constexpr (quick) p_.scale = scale_beside(top, scale_);
        const float offset = __fmul_rn(top, p_.scale);
        const float fall = quick ? offset_ - offset : (p_.top - top) * p_.scale, shrink = p_.power_of(fall);
        if constexpr (with_entropy) entropy_ = shrink * fmaf(fall, total_, entropy_);
        total_ *= shrink;
        weighted_ *= shrink;
        largest_ *= shrink;
        p_.set_top(top, lowest_);
        offset_ = offset;
    }
    __device__ PowerSums<precise> over_block(Sums& shared) const {
        const float rounding = quick ? fmaf(p_.top, p_.scale, -offset_) : 0.0f;
        double sums[3] = {static_cast<double>(total_), static_cast<double>(weighted_),
                          static_cast<double>(entropy_) - static_cast<double>(__fmul_rn(rounding, total_))};
        block_sum(sums, shared);
        const auto top = static_cast<double>(p_.power_of(rounding));
        return {p_, sums[0] / top, sums[1] / top, sums[2] / top, place_};
    }

    float lowest_;
    Powers<precise> p_;
    float scale_, offset_;  // offset_: of exponents
    float total_ = 0.0f, weighted_ = 0.0f, entropy_ = 0.0f;
    float largest_ = -1.0f;  // sum of a vector, without weights
    int place_ = -1;         // of that vector, -2 - place of an element outside of vectors; then of the largest element
};

// Weights 0.
struct Zeros {
    struct All {
        __device__ float add(int, float, float sum) const { return sum; }
    };
    template <int N>
    __device__ All of(int) const {
        return {};
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

// Four of something.
template <typename T>
struct Four {
    T value[4];
};

// `factor` times sums of value(get(index)) over lists, into sums[-1 - list]. Returns the sum of those that this thread
// writes. `ahead`: all are wanted, and what they name is near.
template <bool ahead, typename Get, typename Value>
__device__ __forceinline__ float sum_lists(const SumLists& lists, float* sums, float factor, Get get, Value value) {
    float total = 0.0f, written = 0.0f;
    const int lane = static_cast<int>(threadIdx.x) % warp_size, long_lists = lists.count - lists.few;
    const auto is_wanted = [&](int list) { return ahead || lists.wanted == nullptr || lists.wanted[list] != 0; };
    const auto write = [&](int list, float sum) {
        sums[~list] = sum * factor;
        written += sum * factor;
    };
    const auto end = [&](int list, bool of_all, bool wanted) {
        if (of_all) {
            for (int step = warp_size / 2; step > 0; step /= 2) total += __shfl_xor_sync(all_lanes, total, step);
        }
        if (wanted && (!of_all || lane == 0)) write(list, total);
        total = 0.0f;
    };
    if constexpr (ahead) {
        each_slice<Four<decltype(get(0))>>(
            lists,
            [&](const Ring& ring, int at) {
                copy_async<16>(ring.slot(0), lists.index + at);
                copy_async<16>(ring.slot(1), lists.weight + at);
            },
            [&](const Ring& ring, auto& named) {
                uint32_t index[4];
                read_copied(ring.slot(0), index);
#pragma unroll
                for (int k = 0; k < 4; ++k) named.value[k] = get(static_cast<int>(index[k]));
            },
            [&](const Ring& ring, const auto& named, auto fetch_next) {
                float x[4];
                uint32_t weight[4];
                read_copied(ring.slot(1), weight);
#pragma unroll
                for (int k = 0; k < 4; ++k) x[k] = value(named.value[k]);
                fetch_next();
#pragma unroll
                for (int k = 0; k < 4; ++k) total = fmaf(__uint_as_float(weight[k]), x[k], total);
            },
            [&](int list, bool of_all) { end(list, of_all, list < long_lists); });
    } else {
        each_slice(lists, [&](int list, bool of_all, int begin, int behind) {
            const bool wanted = list < long_lists && is_wanted(list);
            if (!__any_sync(all_lanes, wanted)) return;
            for (int i = begin; i < (wanted ? behind : begin); i += 4) {
                int32_t index[4];
                float weight[4];
                load_lanes(lists.index, i * warp_size + 4 * lane, index);
                load_lanes(lists.weight, i * warp_size + 4 * lane, weight);
#pragma unroll
                for (int k = 0; k < 4; ++k) total = fmaf(weight[k], value(get(index[k])), total);
            }
            end(list, of_all, wanted);
        });
    }
    const int behind = lists.start[lists.slices] * warp_size;
    const int32_t* index_of_few = in_register(base(lists.index) + behind);
    const float* weight_of_few = in_register(base(lists.weight) + behind);
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    Ring ring;
    const auto copy = [&](int list) {
        if (list < lists.few) {
            copy_async<16>(ring.slot(0), index_of_few + 4 * list);
            copy_async<16>(ring.slot(1), weight_of_few + 4 * list);
        }
        ring.push();
    };
#pragma unroll
    for (int k = 0; k < Ring::depth; ++k) copy(thread + k * threads);
#pragma unroll 1
    for (int list = thread; list < lists.few; list += threads) {
        uint32_t index[4], weight[4];
        ring.wait();
        read_copied(ring.slot(0), index);
        read_copied(ring.slot(1), weight);
        copy(list + Ring::depth * threads);
        if (!is_wanted(long_lists + list)) continue;
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            sum = fmaf(__uint_as_float(weight[k]), value(get(static_cast<int>(index[k]))), sum);
        }
        write(long_lists + list, sum);
    }
    return written;
}

// Of a block. What all threads know of a chunk and seldom use is here, and not in their registers.
struct Shared {
    Sums sums;
    float shift, to_mass, small;  // for `Both`
    double total, d;              // Z (1 for a mean, then that of each of its rows), D
    double lift;                  // of q and m, see `Both`
    double of_teacher;            // the loss's part that the teacher alone makes, see `take_total`
    int peak;                     // where more than half of a row's mass is on one token, that token, or -1
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
          workspace_(workspace),
          stored_end_(in_register(stored + Workspace(p.plan, merge, sizeof(S)).stored)),
          rest_(reinterpret_cast<S*>(stored)) {}

    __device__ void run() const {
        const int thread = static_cast<int>(threadIdx.x);
        if (thread == 0) stored(plan_.columns) = 0.0f;
        Both both = masses();
        const Later later = later_tokens();
        both.later = static_cast<float>(later.teacher - later.student);
        const Columns found = columns(both, later);

        double loss = found.loss, factor = 1.0, later_factor = 0.0;
        if constexpr (is_mixed) {
            factor = ::exp(later.student);
            later_factor = factor * found.slope;
        } else if constexpr (merge == Merge::chain) {
            const double c = ::exp(p_.reverse ? later.student : later.teacher);
            loss = c * (loss + (p_.reverse ? later.student - later.teacher : later.teacher - later.student));
            factor = c;
            later_factor = p_.reverse ? loss + c : -c;
        }
        const double temperature = static_cast<double>(p_.temperature), square = temperature * temperature;
        if (thread == 0) p_.losses[k_] = static_cast<float>(loss * square);
        const double scale = (p_.scale == nullptr ? 1.0 : static_cast<double>(p_.scale[k_])) * square;
        const double unit = scale * factor * (p_.reverse || is_mixed ? 1.0 : -1.0) / shared_.d;
        // For one row sum p h is B eps, which is lost in the rounding of all but 0.
        const double b = found.b, mean = b * static_cast<double>(p_.epsilon);
        // Of one row what is stored gets the gradient's factor at once, for the powers that its pass takes.
        double quick = 1.0;
        by_kind(both, [&](auto usual) {
            if constexpr (decltype(usual)::value) quick = QuickPowers<precise>(both.student).factor;
        });
        const double row_factor = merged() == 1 ? unit / temperature : 1.0;
        subtract(b, static_cast<float>(row_factor * quick));
        if (thread == 0 && merged() == 1) stored(plan_.columns) = static_cast<float>(-mean * row_factor * quick);
        __syncthreads();  // u is relative to B now
        if (p_.weight_sums != nullptr) {
            add_weight_gradient(both.student, static_cast<float>(merged() == 1 ? temperature / quick : unit));
        }
        if (p_.grad.data == nullptr) {
            for (int64_t r = row(); r < row() + count(p_.student_rows); ++r) {
                label_term(p_.labels, r, Row<S>(p_.student, r), plan_.students, p_.lowest, shared_.sums);
            }
            return;
        }
        sum_lists<true>(
            plan_.row_lists, end_of_sums(), 1.0f, [&](int n) { return stored_end_[n]; }, [](float x) { return x; });
        __syncthreads();  // the rows' sums are there
        double row_mean = (b + mean) * row_factor, share = row_factor;
        if (merged() > 1) share = unit * shared_.total / (temperature * merged());
        if (merged() > 1) mean_values(both, b);
        for (int64_t r = row(); r < row() + merged(); ++r) {
            const Row<S> z(p_.student, r);
            if (merged() > 1) {
                const PowerSums<precise> found = student_powers(z, Numbers{mean_distribution()}, [] {});
                if (thread == 0) shared_.total = found.total;
                __syncthreads();  // it is there, and the peak
                both.student = found.powers;
                row_mean = found.weighted / found.total;
            }
            token_gradient(r, z, both, row_mean, merged() == 1 ? share : share / shared_.total);
        }
        if constexpr (merge == Merge::chain) {
            const auto factor_of_later = static_cast<float>(scale * later_factor / temperature);
            for (int64_t r = row() + 1; r < row() + count(p_.student_rows); ++r) later_gradient(r, factor_of_later);
        }
    }

  private:
    static constexpr bool precise = sizeof(S) == 4;
    static constexpr double unit = Powers<precise>::unit;
    // Whether there are passes for usual chunks: as the registers allow.
    static constexpr bool has_usual = merge == Merge::first && !is_mixed;
    static constexpr bool is_quick = has_usual && !precise;  // see PowersOf

    // What the passes from the fourth on know of the two distributions. Exponents of q: the whole part of the logarithm
    // of the teacher's total is taken off (its powers' shift), the rest, `lift`, multiplies q and m.
    struct Both {
        Powers<precise> student, teacher;
        AnyRow y;
        float to_mass, small;  // m = to_mass x, both as small (epsilon) times `lift`
        float later;           // of mixed divergences: log c_T - log c_S
    };

    // Log probabilities of the later tokens, log c, under merge="chain".
    struct Later {
        double student, teacher;
    };

    struct Columns {
        double loss, b;
        double slope;  // of mixed divergences: dL / d log c_S, divided by c_S
    };

    // What a thread adds up over columns; some lack a factor that all terms share.
    struct Parts {
        float loss = 0.0f, b = 0.0f;
        // of mixed divergences: the student's part of the loss, and what d loss / d log c_S is made of
        float student = 0.0f, slopes = 0.0f, shares = 0.0f;
    };

    // Of u, the zero, and the sums: backwards, so that the negative numbers of `row_slot` are indices.
    __device__ float& stored(int n) const { return stored_end_[-1 - n]; }
    __device__ float* end_of_sums() const { return in_register(stored_end_ - plan_.columns - 1); }

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
    __device__ float mass(const Powers<precise>& student, int s) const {
        return merged() > 1 ? mean_distribution()[s] : student.power(z_[s]);
    }

    // Calls pass(usual): passes have a copy of their own for usual chunks, without choices.
    template <typename Pass>
    __device__ void by_kind(const Both& both, Pass pass) const {
        if constexpr (has_usual) {
            if (!p_.reverse && !both.student.clamped && !both.teacher.clamped) return pass(std::true_type{});
        }
        pass(std::false_type{});
    }

    // The student's powers, and the peak; `beside` is done before the threads wait for each other.
    template <typename Weights, typename Beside>
    __device__ PowerSums<precise> student_powers(const Row<S>& z, const Weights& weights, Beside beside) const {
        if (threadIdx.x == 0) shared_.peak = -1;
        PowersOf<precise, false, is_quick> powers(p_.lowest, p_.temperature);
        powers.add(z, nullptr, plan_.students, weights);
        beside();
        PowerSums<precise> found = powers.sums(z, shared_.sums);
        if (found.powers.clamped) found = powers.clamped_sums(z, plan_.students, weights, shared_.sums);
        if (is_peaked(found.total) && found.place >= 0) shared_.peak = found.place;
        return found;
    }
    __device__ static bool is_peaked(double total) { return total < 2.0; }

    // Rows of the teacher whose distributions are averaged.
    __device__ int teacher_merged() const { return merge == Merge::mean ? count(p_.teacher_rows) : 1; }

    // Passes 1 to 3: both distributions, the sums of columns, and D.
    __device__ Both masses() const {
        Both both{{}, {}, AnyRow(p_.teacher, p_.teacher_rows.start[k_]), 0.0f, 0.0f, 0.0f};
        double total = 1.0, own;  // S without the columns that are stored
        if (merged() > 1) {
            own = average_student();
        } else {
            const PowerSums<precise> found = plan_.paired == nullptr ? student_powers(z_, Zeros{}, [] {})
                                                                     : student_powers(z_, BitRow<>{plan_.paired}, [&] {
                                                                           copy_rest();
                                                                       });  // its barriers are the copies' too
            both.student = found.powers;
            total = found.total;
            own = found.weighted;
        }
        // Sums wait for memory, the pass over the teacher's row does not: half of the warps begin with each.
        float sum = 0.0f;
        PowersOf<precise, true, is_quick> teacher(p_.lowest, p_.temperature);
        const int warp = static_cast<int>(threadIdx.x) / warp_size;
#pragma unroll 1
        for (int turn = 0; turn < 2; ++turn) {
            if ((warp + turn) % 2 == 0) {
                sum = sum_columns(both.student);
            } else if (teacher_merged() > 1) {
                continue;
            } else if (plan_.empty == nullptr) {
                teacher.add(both.y, plan_.stored, columns_, Zeros{});
            } else {
                typed_row(p_.teacher, p_.teacher_rows.start[k_],
                          [&](const auto& y) { teacher.add(y, nullptr, plan_.teachers, BitRow<>{plan_.empty}); });
            }
        }
        double sums[1] = {static_cast<double>(sum)};
        block_sum(sums, shared_.sums);  // the columns' sums are there, too
        if (threadIdx.x == 0) {
            shared_.total = total;
            shared_.d = own + sums[0] + static_cast<double>(p_.epsilon) * total;
        }
        if (teacher_merged() == 1) {
            const PowerSums<precise> found = teacher.sums(shared_.sums);
            both.teacher = found.powers;
            take_total(both, found, [&] { return ::log(found.total) / unit; });
        } else {
            const double log_total = sum_teacher(teacher_merged()) / unit;
            both.y = AnyRow(teacher_sums());
            PowersOf<precise, true, is_quick> powers(-1e30f,
                                                     p_.temperature * teacher_merged());  // sums of logits are finite
            if (plan_.empty == nullptr) {
                powers.add(both.y, nullptr, size(), Zeros{});
            } else {
                powers.add(both.y, nullptr, size(), BitRow<false>{plan_.empty});
            }
            const PowerSums<precise> found = powers.sums(shared_.sums);
            both.teacher = found.powers;
            take_total(both, found, [&] {
                return log_total - static_cast<double>(both.teacher.top) * static_cast<double>(both.teacher.scale);
            });
        }
        return both;
    }

    // The mean distribution; returns its sum over the rows of pairs.
    __device__ double average_student() const {
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
        const BitRow<> paired{plan_.paired};
        float sum = 0.0f;
        for (int s = static_cast<int>(threadIdx.x); s < plan_.students; s += static_cast<int>(blockDim.x)) {
            if (plan_.paired != nullptr && paired[s]) sum += mean_distribution()[s];
        }
        double sums[1] = {static_cast<double>(sum)};
        block_sum(sums, shared_.sums);
        return sums[0];
    }

    // Sums of the columns with several entries; returns those of this thread, and its share of x of the other columns
    // that are stored, unless they are all that have no pair.
    __device__ float sum_columns(const Powers<precise>& student) const {
        const SumLists& lists = plan_.column_lists;
        const bool averaged = merged() > 1;
        const auto power = [&](float x) { return averaged ? x : student.power(x); };
        if (plan_.paired != nullptr) {
            if (!has_usual || student.clamped) {
                const auto get = [&](int i) {
                    return averaged ? mean_distribution()[plan_.unpaired[i]] : widen(rest_[i]);
                };
                return sum_lists<true>(lists, end_of_sums(), 1.0f, get, power);
            }
            const QuickPowers<precise> quick(student);
            const S* rest = in_register(rest_);
            return sum_lists<true>(
                lists, end_of_sums(), static_cast<float>(quick.factor),
                [&](int i) { return rest[static_cast<unsigned>(i)]; }, [&](S x) { return quick.power(widen(x)); });
        }
        const auto get = [&](int i) { return averaged ? mean_distribution()[i] : z_[i]; };
        float sum = sum_lists<false>(lists, end_of_sums(), 1.0f, get, power);
        if (plan_.empty != nullptr) return sum;
        for (int n = static_cast<int>(threadIdx.x); n < columns_; n += static_cast<int>(blockDim.x)) {
            if (plan_.column_slot[n] < plan_.students) sum += power(get(plan_.column_slot[n]));
        }
        return sum;
    }

    // Finds the shift of the teacher's powers and the scale of m, with log_total() that of all powers. In a loss
    // KL(q || m) what q says of itself is known with it, and m of the columns without entries, which is 0. By one
    // thread: it takes many instructions.
    template <typename LogTotal>
    __device__ void take_total(Both& both, const PowerSums<precise>& f, LogTotal log_total) const {
        if (threadIdx.x == 0) {
            const double all = log_total(), whole_part = ::rint(all), rest = all - whole_part;
            const double lift = ::exp(rest * unit), epsilon = static_cast<double>(p_.epsilon);
            const double distance = rest + ::log(epsilon) / unit;
            shared_.lift = lift;
            shared_.of_teacher = ::exp(-all * unit) * (f.entropy - whole_part * f.total - f.weighted * distance);
            shared_.shift = static_cast<float>(whole_part);
            shared_.to_mass = static_cast<float>(lift / shared_.d);
            shared_.small = static_cast<float>(lift * epsilon);
        }
        __syncthreads();  // these and D are there
        both.teacher.shift = shared_.shift;
        both.to_mass = shared_.to_mass;
        both.small = shared_.small;
    }

    // z of the rows without a pair, close together for the sums of columns; a thread copies two at a time.
    __device__ void copy_rest() const {
        using Two = std::conditional_t<sizeof(S) == 2, uint32_t, uint2>;
        static_assert(sizeof(Two) == 2 * sizeof(S), "two elements");
        const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), twos = plan_.rest / 2;
        const auto* places = reinterpret_cast<const int2*>(plan_.unpaired);
        auto* to = reinterpret_cast<Two*>(rest_);
        constexpr int N = 4;  // times two loads in flight
#pragma unroll 1              // the registers do not allow more of them
        for (int first = thread; first < twos; first += N * threads) {
            int2 from[N];
            S z[N][2];
#pragma unroll
            for (int k = 0; k < N; ++k) {
                from[k] = make_int2(0, 0);
                if (first + k * threads < twos) from[k] = places[first + k * threads];
            }
#pragma unroll
            for (int k = 0; k < N; ++k) {
                z[k][0] = z_.data[from[k].x];
                z[k][1] = z_.data[from[k].y];
            }
#pragma unroll
            for (int k = 0; k < N; ++k) {
                Two both;
                memcpy(&both, z[k], sizeof both);
                if (first + k * threads < twos) to[first + k * threads] = both;
            }
        }
        if (thread == 0 && plan_.rest % 2 != 0) rest_[plan_.rest - 1] = z_.data[plan_.unpaired[plan_.rest - 1]];
    }

    // C: all columns, or those that are stored.
    __device__ const int32_t* chosen() const { return plan_.empty != nullptr ? nullptr : plan_.stored; }
    __device__ int size() const { return plan_.empty != nullptr ? plan_.teachers : columns_; }

    // Passes 4 and 5: u of the columns that are stored, the loss and B. Mixed divergences are those of c_T q and c_S m.
    __device__ Columns columns(const Both& both, const Later& later) const {
        Parts parts;
        stored_columns(both, parts);
        if (plan_.paired != nullptr) {
            by_kind(both, [&](auto usual) { pairs(usual, both, parts); });
        }
        if (is_mixed && plan_.empty != nullptr) columns_without_entries(both, parts);
        double loss = static_cast<double>(parts.loss) / (p_.reverse ? shared_.d : shared_.lift), slope = 0.0;
        if constexpr (is_mixed) {
            const double pulled = p_.divergence.teacher * (1.0 - p_.divergence.mixture);
            loss = ::exp(later.teacher) * loss + ::exp(later.student) * static_cast<double>(parts.student) / shared_.d;
            slope = static_cast<double>(parts.slopes) / shared_.d -
                    pulled * static_cast<double>(p_.epsilon) * static_cast<double>(parts.shares);
        }
        double sums[3] = {loss, static_cast<double>(parts.b), slope};
        block_sum(sums, shared_.sums);
        loss = size() > 0 ? sums[0] : static_cast<double>(nanf(""));
        if constexpr (!is_mixed) loss = unit * (loss + (p_.reverse ? 0.0 : shared_.of_teacher));
        return {loss, sums[1] / shared_.d, sums[2]};
    }

    __device__ void stored_columns(const Both& both, Parts& parts) const {
        constexpr int N = 4;  // loads in flight
        const bool by_id = plan_.empty != nullptr || teacher_merged() == 1;
        const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
        for (int first = thread; first < columns_; first += N * threads) {
            int32_t place[N], slot[N];
            float x[N], y[N], u[N];
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const int n = first + k * threads;
                place[k] = n >= columns_ ? -1 : by_id ? plan_.stored[n] : n;
                slot[k] = n >= columns_ ? plan_.students : plan_.column_slot[n];
            }
            both.y.gather(place, y);
#pragma unroll
            for (int k = 0; k < N; ++k) {
                x[k] = slot[k] < plan_.students ? mass(both.student, slot[k])
                                                : stored(plan_.columns + slot[k] - plan_.students);
            }
            slopes(both, place, x, y, u, parts);
#pragma unroll
            for (int k = 0; k < N; ++k) {
                if (first + k * threads < columns_) stored(first + k * threads) = u[k];
            }
        }
    }

    // Those of usual chunks.
    __device__ void pairs(std::true_type, const Both& both, Parts& parts) const {
        const QuickPowers<precise> teacher(both.teacher);
        Parts quick;
        each_partner<false>(z_, both.y, plan_.row_slot, plan_.students,
                            [&](int, const auto& z, const auto&, const auto& y) {
                                constexpr int N = sizeof(z) / sizeof(float);
                                float x[N], f[N], u[N];
                                both.student.template of<false>(z, x);
                                teacher.of(y, f);
                                forward_slopes(both, f, x, u, quick);
                            });
        parts.loss = fmaf(quick.loss, static_cast<float>(teacher.factor), parts.loss);
        parts.b = fmaf(quick.b, static_cast<float>(teacher.factor), parts.b);
    }

    __device__ void pairs(std::false_type, const Both& both, Parts& parts) const {
        const bool averaged = merged() > 1;
        each_partner(z_, both.y, plan_.row_slot, plan_.students,
                     [&](int i, const auto& z, const auto& place, const auto& y) {
                         float x[sizeof(z) / sizeof(float)], u[sizeof(z) / sizeof(float)];
                         if (averaged) {
                             load_lanes(mean_distribution(), i, x);
                         } else {
                             both.student.template of<true>(z, x);
                         }
                         slopes(both, place, x, y, u, parts);
                     });
    }

    __device__ void columns_without_entries(const Both& both, Parts& parts) const {
        each_pair(both.y, BitRow<false>{plan_.empty}, size(), [&](int, const auto& y, const auto& is_empty) {
            constexpr int N = sizeof(y) / sizeof(float);
            int32_t place[N];
            float x[N], u[N];
#pragma unroll
            for (int k = 0; k < N; ++k) {
                place[k] = is_empty[k] ? 0 : -1;
                x[k] = 0.0f;
            }
            slopes(both, place, x, y, u, parts);
        });
    }

    // u of columns with these x and logits y of the teacher, at `place` (negative: no column).
    template <int N>
    __device__ void slopes(const Both& both, const int32_t (&place)[N], const float (&x)[N], const float (&y)[N],
                           float (&u)[N], Parts& parts) const {
        if constexpr (is_mixed) return mixed_slopes(both, place, x, y, u, parts);
        if (p_.reverse) {
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const float e = place[k] < 0 ? 0.0f : x[k], m = e * both.to_mass, added = m + both.small;
                const float difference = both.teacher.log(added) - both.teacher.exponent(y[k]);
                u[k] = fmaf(difference, static_cast<float>(unit), quotient(m, added, precise));
                parts.loss = fmaf(e, difference, parts.loss);
                parts.b = fmaf(e, u[k], parts.b);
            }
        } else {
            float f[N];
#pragma unroll
            for (int k = 0; k < N; ++k) f[k] = place[k] < 0 ? 0.0f : both.teacher.power(y[k]);
            forward_slopes(both, f, x, u, parts);
        }
    }

    // Those of KL(q || m), of the teacher's powers; the loss lacks what is `of_teacher`.
    template <int N>
    __device__ void forward_slopes(const Both& both, const float (&f)[N], const float (&x)[N], float (&u)[N],
                                   Parts& parts) const {
#pragma unroll
        for (int k = 0; k < N; ++k) {
            const float added = fmaf(x[k], both.to_mass, both.small);
            u[k] = quotient(f[k], added, precise);
            parts.loss = fmaf(-f[k], Powers<precise>::log(added), parts.loss);
            parts.b = fmaf(x[k], u[k], parts.b);
        }
    }

    template <int N>
    __device__ void mixed_slopes(const Both& both, const int32_t (&place)[N], const float (&x)[N], const float (&y)[N],
                                 float (&u)[N], Parts& parts) const {
        const MixedDivergence divergence(p_.divergence, precise);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            const bool inside = place[k] >= 0;
            const float exponent = both.teacher.exponent(y[k]), e = inside ? x[k] : 0.0f;
            const float m = e * both.to_mass, added = m + both.small;
            const float difference = (exponent - both.teacher.log(added)) * static_cast<float>(unit);
            const MixedDivergence::Terms terms = divergence(difference + both.later);
            u[k] = divergence.slope(terms, quotient(m, added, precise));
            parts.loss = fmaf(inside ? both.teacher.power_of(exponent) : 0.0f, terms.of_teacher, parts.loss);
            parts.student = fmaf(e, terms.of_student, parts.student);
            parts.b = fmaf(e, u[k], parts.b);
            if constexpr (merge == Merge::chain) {
                parts.slopes = fmaf(e, divergence.slope(terms), parts.slopes);
                parts.shares += inside ? terms.share : 0.0f;
            }
        }
    }

    // What is stored becomes `factor` (u - B).
    __device__ void subtract(double b, float factor) const {
        const auto high = static_cast<float>(b), low = static_cast<float>(b - static_cast<double>(high));
        for (int n = static_cast<int>(threadIdx.x); n < columns_; n += static_cast<int>(blockDim.x)) {
            stored(n) = ((stored(n) - high) - low) * factor;
        }
    }

    // `factor` u - `mean` of rows that are pairs, and of the others (`place` is negative) what is stored, which is so
    // already.
    template <int N>
    __device__ void row_values(const int32_t (&place)[N], const float (&u)[N], float factor, double mean,
                               float (&h)[N]) const {
        const auto high = static_cast<float>(mean), low = static_cast<float>(mean - static_cast<double>(high));
#pragma unroll
        for (int k = 0; k < N; ++k) {
            float own = fmaf(u[k], factor, -high);
            if constexpr (precise) own -= low;
            h[k] = place[k] < 0 ? stored_end_[place[k]] : own;
        }
    }

    // h in the place of the mean distribution.
    __device__ void mean_values(const Both& both, double b) const {
        __syncthreads();  // gradients of W have been added
        for (int s = static_cast<int>(threadIdx.x); s < plan_.students; s += static_cast<int>(blockDim.x)) {
            const int32_t place[1] = {plan_.row_slot[s]};
            const float x[1] = {mean_distribution()[s]};
            float y[1], u[1], h[1];
            both.y.gather(place, y);
            Parts unused;
            slopes(both, place, x, y, u, unused);
            row_values(place, u, 1.0f, b, h);
            mean_distribution()[s] = h[0];
        }
        __syncthreads();  // h is there
    }

    // Sums of the teacher's logits, relative to the rows' maxima; returns the mean of the logarithms of their totals,
    // to the base 2.
    __device__ double sum_teacher(int merged) const {
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

    __device__ Later later_tokens() const {
        if constexpr (merge == Merge::chain) {
            return {later_log_probability<Row<S>>(p_.student, p_.student_rows, row(), count(p_.student_rows)),
                    later_log_probability<AnyRow>(p_.teacher, p_.teacher_rows, p_.teacher_rows.start[k_],
                                                  count(p_.teacher_rows))};
        } else {
            return {0.0, 0.0};
        }
    }

    // Sum over the rows but the first of log p(the token that follows).
    template <typename R>
    __device__ double later_log_probability(const Logits& logits, const ChunkRows& rows, int64_t start,
                                            int count) const {
        double result = 0.0;
        for (int64_t r = start + 1; r < start + count; ++r) {
            const R z(logits, r);
            const Statistics all = row_statistics(z, logits.width, p_.lowest, p_.temperature, shared_.sums);
            result += all.log_share(z[static_cast<int>(rows.next[r])]);
        }
        return result;
    }

    // The gradient of row r, of which `both` has the student's powers: e_s factor (h_s - mean) if several rows are
    // averaged, else e_s (factor h_s - mean).
    __device__ void token_gradient(int64_t r, const Row<S>& z, const Both& both, double mean, double factor) const {
        const Statistics known{{precise, both.student.top, p_.lowest, 1.0f / p_.temperature}, shared_.total, 0.0};
        const LabelTerm label =
            label_term(p_.labels, r, z, plan_.students, p_.lowest, shared_.sums, p_.temperature == 1.0f, known);
        S* grad = row_of<S>(p_.grad, r);
        const int peak = is_peaked(shared_.total) ? shared_.peak : -1;  // whose gradient is computed last
        float others = 0.0f;
        const QuickPowers<precise> student(both.student), teacher(both.teacher);  // of usual chunks
        // g: without the label's term, and without the derivative of max(z, lowest), which the peak's is not a sum with
        const auto finish = [&](auto usual, int i, const auto& z, auto& g) {
            constexpr int N = sizeof(g) / sizeof(float);
            if (peak >= 0) {
                if (peak < i || peak >= i + N) {
#pragma unroll
                    for (int k = 0; k < N; ++k) others += g[k];
                } else {
#pragma unroll
                    for (int k = 0; k < N; ++k) others += i + k == peak ? 0.0f : g[k];
                }
            }
            if constexpr (!decltype(usual)::value) {
#pragma unroll
                for (int k = 0; k < N; ++k) g[k] = z[k] < p_.lowest ? 0.0f : g[k];
            }
            label.add(i, z, g);
        };
        // h: with the factor
        const auto multiply = [&](const auto& z, const auto& h, auto& g) {
            constexpr int N = sizeof(g) / sizeof(float);
            both.student.template of<true>(z, g);
#pragma unroll
            for (int k = 0; k < N; ++k) g[k] *= h[k];
        };
        const auto write = [&](auto each, auto prepare) {
            write_row(z, grad, plan_.students, p_.grad.width, each, prepare);
        };
        const auto beside = [&](const float* row) {
            return [this, row, &z](auto body) { each_pair(z, AnyRow(row), plan_.students, body); };
        };
        const auto partners = [&](auto body) { each_partner(z, both.y, plan_.row_slot, plan_.students, body); };
        if (merged() > 1) {
            const auto high = static_cast<float>(mean), low = static_cast<float>(mean - static_cast<double>(high));
            const auto share = static_cast<float>(factor);
            write(beside(mean_distribution()), [&](int i, const auto& z, const auto& values, auto& g) {
                constexpr int N = sizeof(z) / sizeof(float);
                float h[N];
#pragma unroll
                for (int k = 0; k < N; ++k) h[k] = ((values[k] - high) - low) * share;
                multiply(z, h, g);
                finish(std::false_type{}, i, z, g);
            });
        } else if (plan_.paired == nullptr) {
            by_kind(both, [&](auto usual) {
                write(beside(reinterpret_cast<const float*>(plan_.row_slot)),
                      [&](int i, const auto& z, const auto& slot, auto& g) {
                          constexpr int N = sizeof(z) / sizeof(float);
                          float h[N];
#pragma unroll
                          for (int k = 0; k < N; ++k) h[k] = stored_end_[__float_as_int(slot[k])];
                          if constexpr (decltype(usual)::value) {
                              student.of(z, g);
#pragma unroll
                              for (int k = 0; k < N; ++k) g[k] *= h[k];
                          } else {
                              multiply(z, h, g);
                          }
                          finish(usual, i, z, g);
                      });
            });
        } else {
            by_kind(both, [&](auto usual) {
                if constexpr (decltype(usual)::value) {
                    const auto to_mass = static_cast<float>(static_cast<double>(both.to_mass) * student.factor);
                    const auto scale = static_cast<float>(factor * student.factor * teacher.factor);
                    write(partners, [&](int i, const auto& z, const auto& place, const auto& y, auto& g) {
                        constexpr int N = sizeof(z) / sizeof(float);
                        float h[N], u[N];
                        student.of(z, g);
                        teacher.of(y, u);
#pragma unroll
                        for (int k = 0; k < N; ++k) {
                            u[k] = quotient(u[k], fmaf(g[k], to_mass, both.small), precise);
                        }
                        row_values(place, u, scale, mean * student.factor, h);
#pragma unroll
                        for (int k = 0; k < N; ++k) g[k] *= h[k];
                        finish(usual, i, z, g);
                    });
                } else {
                    write(partners, [&](int i, const auto& z, const auto& place, const auto& y, auto& g) {
                        constexpr int N = sizeof(z) / sizeof(float);
                        float h[N], u[N];
                        Parts unused;
                        both.student.template of<true>(z, g);
                        slopes(both, place, g, y, u, unused);
                        row_values(place, u, static_cast<float>(factor), mean, h);
                        multiply(z, h, g);
                        finish(usual, i, z, g);
                    });
                }
            });
        }
        if (peak < 0) return;
        double sums[1] = {static_cast<double>(others)};
        block_sum(sums, shared_.sums);
        if (threadIdx.x == 0) {
            narrow(static_cast<float>(static_cast<double>(label(peak, both.student.top)) - sums[0]), grad[peak]);
        }
    }

    // A later row under merge="chain": factor * (onehot - softmax).
    __device__ void later_gradient(int64_t r, float factor) const {
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
    __device__ void add_weight_gradient(const Powers<precise>& student, float unit) const {
        float* sums = p_.weight_sums + blockIdx.x * plan_.entries;
        for (int64_t e = threadIdx.x; e < plan_.entries; e += blockDim.x) {
            const float x = mass(student, static_cast<int>(plan_.entry_row[e]));
            sums[e] += x * unit * stored(static_cast<int>(plan_.entry_column[e]));
        }
    }

    const PklParams& p_;
    const PklPlan& plan_;
    int columns_;
    Shared& shared_;
    const int64_t& k_;
    Row<S> z_;
    float *workspace_, *stored_end_;
    S* rest_;
};

// `ring_bytes` of dynamic shared memory are followed by room for what is stored; 0: the workspace has it.
template <typename S, Merge merge, bool is_mixed>
__global__ __launch_bounds__(max_threads, resident_blocks) void pkl_kernel(const __grid_constant__ PklParams params,
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
#ifndef XTOKEN_USUAL_ALONE
            if (params.merge == Merge::mean) kernel = pkl_kernel<S, Merge::mean, is_mixed>;
            if (params.merge == Merge::chain) kernel = pkl_kernel<S, Merge::chain, is_mixed>;
#endif
            return kernel;
        };
        auto* kernel = params.divergence.is_mixed() ? chosen(std::true_type{}) : chosen(std::false_type{});
        const size_t ring = Ring::bytes(3);  // a row, and a table of four bytes an element
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
