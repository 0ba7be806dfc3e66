// Prefix KL of one chunk by one block. The formula is that of xtoken.reference.prefix.
//
// At a boundary let a_e, b_e be the sums of exp(logit) of the student's and the teacher's tokens in the event e, to the
// power of 1 / tau, A and B their sums over the events that both sides have, P_e = a_e / A and Q_e = b_e / B. Then
//   KL(Q || P) = sum Q_e D_e + log A - log B,  D_e = log b_e - log a_e,   d / d log a_e = P_e - Q_e
//   KL(P || Q) = sum P_e D_e + log B - log A,  D_e = log a_e - log b_e,   d / d log a_e = P_e (D_e - sum P D)
// (divergences from a mixture of the two: cpu/divergence.h; with their slopes s, d / d log a_e = P_e (s_e - sum P s))
// and d log a_e / d logit_s = (share of s in the sum) / tau for its tokens s. Every boundary has a weight: that of the
// start is 0 where the realised first tokens have different events; those inside are 1, or the product of the teacher's
// probabilities of what is realised before. Events of which one tokenizer alone knows, from the token before, that they
// do not start the chunk, are left out there like those that one side lacks; they are few.
//
// An event of several tokens is kept as the largest logit ("top") and the sum of the exponentials relative to it, so
// that log a_e is exact however small a_e is; with a temperature all of it is in the top, and the sum is 1. At the
// start of a chunk most events are pairs of one token on each side:
//   1. z, gathers of y: the pairs' sums, relative to the largest logits that a thread has met
//   2. gathers of z and y: tops and sums of the other events           3. these events: their part of A, B and sum Q D
//   (with a mixture z once more, with gathers of y: the divergence takes A and B)
//   4. their slopes                                                    5. z, gathers of y and of slopes: the gradient
// Boundaries inside tokens follow row by row. Their tokens are a range of the sorted vocabulary, found by the whole
// block at once, and their part of the gradient is sparse: it replaces the dense pass's elements after it.
#include <algorithm>

#include "core/boundary_walk.h"
#include "cuda/chunks.cuh"
#include "cuda/divergence.cuh"
#include "cuda/rows.cuh"
#include "losses/prefix_kl/params.h"

namespace xtoken::cuda {
namespace {

constexpr float nothing = -1e30f;            // a logit without mass that can be subtracted from another one
constexpr float outweighs = -3.4028235e38f;  // added to any logit, its exponential is finite

// The sum of exp((x - top) / temperature) over some logits x.
struct alignas(8) Mass {
    float top, sum;
};

// Parts of a block's workspace, in floats.
struct Workspace {
    int64_t masses;  // of one side's events at the start of a chunk
    int64_t inner;   // one number or half a mass for each event inside a token
    int64_t flags;   // a byte for each of the student's tokens
    int64_t bits;    // one for each token of a side

    __host__ __device__ explicit Workspace(const PrefixPlan& plan)
        : masses(whole(2 * (int64_t{1} + plan.events))),
          inner(whole(int64_t{1} + plan.most)),
          flags(whole((int64_t{plan.side[0].size} + 3) / 4)),
          bits(whole((larger(plan.side[0].size, plan.side[1].size) + 31) / 32)) {}
    __host__ __device__ int64_t total() const { return 3 * masses + 7 * inner + flags + bits; }

  private:
    __host__ __device__ static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
};

// Events begin ... end - 1 of a boundary. The student's sums become slopes: d loss / d log a_e over the sum.
struct Events {
    Mass *student, *teacher;
    int begin, end;
};

// Powers of e of scaled logits of 16 bits, relative to one of them. An exponent is a product and a difference to the
// rounded offset, one instruction: all are `power(top)` times too large.
struct ScaledPowers {
    float factor, scale, top, offset;

    __device__ ScaledPowers(float top, float factor) : factor(factor * log2_e) { take(top); }
    __device__ float power(float x) const { return fast_exp2(fmaf(x, scale, -offset)); }
    // Takes another top; returns the factor of powers so far.
    __device__ float move(float new_top) {
        const float before = offset;
        take(new_top);
        return fast_exp2(before - offset);
    }

  private:
    __device__ void take(float new_top) {
        top = new_top;
        scale = scale_beside(top, factor);
        offset = __fmul_rn(top, scale);
    }
};

// Sums over pairs; `products` are those of weight and D, with logits relative to the tops.
struct PairSums {
    float z_top, y_top, p, q, products;
};

// The same of a whole boundary, over the block.
struct BoundarySums {
    float z_centre, y_centre;
    double p, q, products;
};

// What makes a gradient of a boundary: student * e - teacher * f, or the reverse student * e * (tau D - mean), or with
// a mixture student * e * (s - mean), with exponentials and logits relative to the centres.
struct Term {
    float z_centre, y_centre;
    float student, teacher;
    float mean_high, mean_low;
    float shift;  // log A - log B
    double p, q;  // A and B, relative to the centres
};

// What the boundaries inside tokens leave for the gradient of a row.
struct Inside {
    // The tokens that continue; their parts of the gradient are in the workspace.
    const int32_t* ids = nullptr;
    int count = 0;
    int marked = 0;         // events whose tokens have a bit in the workspace
    Mass ends{0.0f, 0.0f};  // the slope of what the other tokens have
};

using Walk = BoundaryWalk<int>;

// Shared memory of a block. What all threads agree on is here where it would take registers for long.
struct Shared {
    Sums sums;
    Walk walk[2];  // tokens that continue: of the student, of the teacher
    Term start, inner;
    Mass unmatched;  // student tokens in events that the teacher lacks
    int found[max_threads / warp_size];
    double loss;
    double weight;  // of the next boundary
};

// The first of begin ... end - 1 that is_before is not true of, or end; it is true up to there. By all threads
// together.
template <typename Before>
__device__ int first_not(int begin, int end, Before is_before) {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    while (begin < end) {
        const int step = (end - begin + threads - 1) / threads;
        const int64_t at = begin + int64_t{thread} * step;
        const int before = __syncthreads_count(at < end && is_before(static_cast<int>(at)));
        if (before == 0) return begin;
        const int64_t limit = begin + int64_t{before} * step;
        begin = static_cast<int>(limit) - step + 1;
        if (limit < end) end = static_cast<int>(limit);
    }
    return begin;
}

// The first of `count` ascending numbers that is not below x.
__device__ inline int first_from(const int32_t* numbers, int count, int32_t x) {
    int place = 0;
    for (int end = count; place < end;) {
        const int middle = (place + end) / 2;
        if (numbers[middle] < x) {
            place = middle + 1;
        } else {
            end = middle;
        }
    }
    return place;
}

template <typename S>
class Chunk {
  public:
    // `masses`: in shared memory, of the student's events at the start; null: the workspace has them.
    __device__ Chunk(const PrefixParams& p, const int64_t& k, Shared& shared, float* masses)
        : p_(p),
          plan_(p.plan),
          shared_(shared),
          k_(k),
          inverse_temperature_(1.0f / p.temperature),
          tempered_(p.temperature != 1.0f),
          mixed_(is_mixed(p.divergence)),
          divergence_(p.divergence, sizeof(S) == 4),
          y_(p.teacher, teacher_row()) {
        const Workspace parts(p.plan);
        float* at = p.workspace + blockIdx.x * parts.total();
        const auto take = [&](int64_t floats) {
            float* part = at;
            at += floats;
            return part;
        };
        float *student = take(parts.masses), *teacher = take(parts.masses);
        listed_ = reinterpret_cast<Mass*>(take(parts.masses));
        are_shared_ = masses != nullptr;
        start_ = {reinterpret_cast<Mass*>(are_shared_ ? masses : student), reinterpret_cast<Mass*>(teacher), 0,
                  plan_.events};
        inner_ = {reinterpret_cast<Mass*>(take(2 * parts.inner)), reinterpret_cast<Mass*>(take(2 * parts.inner)), 0, 0};
        event_ = reinterpret_cast<int32_t*>(take(parts.inner));
        begin_ = reinterpret_cast<int32_t*>(take(parts.inner));
        values_ = take(parts.inner);
        left_flags_ = reinterpret_cast<uint8_t*>(take(parts.flags));
        bits_ = reinterpret_cast<unsigned*>(take(parts.bits));
    }

    // By all threads, before the first chunk of a block.
    __device__ void clear_flags() {
        const int threads = static_cast<int>(blockDim.x);
        for (int s = static_cast<int>(threadIdx.x); s < plan_.side[0].size; s += threads) left_flags_[s] = 0;
    }

    __device__ void run() {
        const bool several = count() > 1 || teacher_count() > 1;
        if (threadIdx.x == 0) {
            const PrefixSide &student = plan_.side[0], &teacher = plan_.side[1];
            shared_.loss = 0.0;
            shared_.weight = student.event[*student_tokens()] == teacher.event[*teacher_tokens()] ? 1.0 : 0.0;
            if (several) start_walks();
        }
        compare_start();
        if (threadIdx.x == 0) shared_.weight = p_.weighted && several ? start_probability() : 1.0;
        for (int i = 0; i < count(); ++i) write(i, several ? compare_inside(i) : Inside{});
        if (left_out_) {
            for (int side = 0; side < 2; ++side) {
                __syncthreads();  // the flags are read; both sides may know of an event
                each_known(side, [&](int32_t event) {
                    if (plan_.place[event] >= 0) left_flags_[plan_.place[event]] = 0;
                });
            }
        }
        const double temperature = static_cast<double>(p_.temperature);
        if (threadIdx.x == 0) p_.losses[k_] = static_cast<float>(shared_.loss * temperature * temperature);
    }

  private:
    // exp(x / temperature) for the student's and the teacher's logits
    __device__ float student_exp(float x) const { return scaled_exp(x, inverse_temperature_, sizeof(S) == 4); }
    __device__ float teacher_exp(float x) const { return scaled_exp(x, inverse_temperature_, y_.precise()); }
    __device__ float clamped(float x) const { return at_least(x, p_.lowest); }

    // An event's mass, from that at temperature 1.
    __device__ Mass tempered(const Mass& mass) const {
        return tempered_ ? Mass{mass.top + logf(mass.sum), 1.0f} : mass;
    }

    // Where the chunk's rows begin, and how many there are; asked for anew each time, since registers are scarce.
    __device__ int64_t row() const { return p_.student_rows.start[k_]; }
    __device__ int64_t teacher_row() const { return p_.teacher_rows.start[k_]; }
    __device__ int count() const { return static_cast<int>(p_.student_rows.count[k_]); }
    __device__ int teacher_count() const { return static_cast<int>(p_.teacher_rows.count[k_]); }

    // ---- the start of the chunk ----

    __device__ void compare_start() {
        sum_lists(plan_.student_lists, Row<S>(p_.student, row()), [&](int list, const Mass& mass) {
            const int event = list == plan_.unmatched ? plan_.events : list - (list > plan_.unmatched);
            start_.student[event].top = mass.top;
            start_.student[event].sum = mass.sum;
        });
        typed_row(p_.teacher, teacher_row(), [&](const auto& y) {
            sum_lists(plan_.teacher_lists, y, [&](int list, const Mass& mass) {
                listed_[list].top = mass.top;
                listed_[list].sum = mass.sum;
            });
        });
        __syncthreads();  // the masses are there
        number_teacher();
        __syncthreads();  // and the teacher's in the order of the events
        left_out_ = leave_out();
        set_term(sum_boundary(start_, is_usual() ? compare_usual_pairs() : compare_pairs()), shared_.start);
        if (mixed_) add_mixed_term(start_, true, shared_.start);
        if (p_.grad.data != nullptr) find_slopes(start_, shared_.start);
        if (threadIdx.x == 0) {
            shared_.unmatched = start_.student[plan_.events];
            start_.student[plan_.events] = {outweighs, 0.0f};  // which makes any gradient 0
        }
        __syncthreads();  // the slopes are there
    }

    // The masses of the teacher's lists, by event.
    __device__ void number_teacher() const {
        constexpr int N = 4;  // loads in flight
        const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
        for (int first = thread; first < plan_.events; first += N * threads) {
            int list[N];
            Mass mass[N];
#pragma unroll
            for (int k = 0; k < N; ++k) list[k] = plan_.teacher_list[min(first + k * threads, plan_.events - 1)];
#pragma unroll
            for (int k = 0; k < N; ++k) mass[k] = listed_[list[k]];
#pragma unroll
            for (int k = 0; k < N; ++k) {
                if (first + k * threads < plan_.events) start_.teacher[first + k * threads] = mass[k];
            }
        }
    }

    // Calls body(event), by one thread each, with the events of which a side's tokenizer knows that they do not start
    // the chunk.
    template <typename Body>
    __device__ void each_known(int side, Body body) const {
        const int32_t *begin, *end;
        known(side, begin, end);
        for (begin += threadIdx.x; begin < end; begin += blockDim.x) body(*begin);
    }
    __device__ void known(int side, const int32_t*& begin, const int32_t*& end) const {
        const PrefixSide& own = plan_.side[side];
        const int64_t* before = side == 0 ? p_.student_rows.before : p_.teacher_rows.before;
        const int64_t token = before == nullptr ? -1 : before[k_];
        const bool is_token = token >= 0 && token < own.size;
        begin = own.known + (is_token ? own.known_ptr[token] : 0);
        end = own.known + (is_token ? own.known_ptr[token + 1] : 0);
    }

    // Marks the events that only one side's tokenizer knows not to start the chunk, or that are merged and it knows it
    // of a part: flags of pairs, and lists without mass. Returns whether there are any.
    __device__ bool leave_out() {
        bool any = false;
        for (int side = 0; side < 2; ++side) {
            const int32_t *begin, *end;
            known(1 - side, begin, end);
            const int count = static_cast<int>(end - begin);
            each_known(side, [&](int32_t event) {
                const int32_t place = plan_.place[event];
                if (place == absent_event) return;
                const int at = first_from(begin, count, event);
                const bool both = at < count && begin[at] == event;
                if (both && (side == 1 || plan_.merged[event] == 0)) return;  // the student's threads do it
                any = true;
                if (place >= 0) {
                    left_flags_[place] = 1;
                } else {
                    start_.student[-1 - place] = start_.teacher[-1 - place] = {nothing, 1.0f};
                }
            });
        }
        return __syncthreads_or(any) != 0;
    }

    // Whether the chunk's start is one of those whose pairs have a pass of their own, without choices for an element.
    __device__ bool is_usual() const { return sizeof(S) == 2 && !y_.precise() && !p_.reverse && !left_out_; }

    // The pairs of any chunk.
    __device__ PairSums compare_pairs() const {
        PairSums sums{p_.lowest, p_.lowest, 0.0f, 0.0f, 0.0f};
        float z_least = 0.0f, y_least = 0.0f;  // the lowest logit, relative to the tops
        const auto add = [&](int i, const auto& x, const auto& slot, const auto& partner) {
            constexpr int N = sizeof(x) / sizeof(float);
            constexpr int M = N < 4 ? N : 4;  // at a time, to keep within the registers
#pragma unroll
            for (int first = 0; first < N; first += M) {
                const auto is_pair = [&](int k) {
                    return slot[first + k] >= 0 && (!left_out_ || left_flags_[i + first + k] == 0);
                };
                float z_top = sums.z_top, y_top = sums.y_top;
#pragma unroll
                for (int k = 0; k < M; ++k) {
                    z_top = fmaxf(z_top, is_pair(k) ? x[first + k] : -INFINITY);
                    y_top = fmaxf(y_top, is_pair(k) ? partner[first + k] : -INFINITY);
                }
                if (z_top > sums.z_top || y_top > sums.y_top) {
                    sums = moved(sums, z_top, y_top);
                    z_least = p_.lowest - z_top;
                    y_least = p_.lowest - y_top;
                }
                float z[M], y[M], e[M], f[M];
#pragma unroll
                for (int k = 0; k < M; ++k) {
                    z[k] = largest(x[first + k] - z_top, z_least);
                    y[k] = largest(partner[first + k] - y_top, y_least);
                }
                scaled_exp(z, inverse_temperature_, sizeof(S) == 4, e);
                scaled_exp(y, inverse_temperature_, y_.precise(), f);
#pragma unroll
                for (int k = 0; k < M; ++k) {
                    if (!is_pair(k)) continue;
                    sums.p += e[k];
                    sums.q += f[k];
                    sums.products =
                        p_.reverse ? fmaf(e[k], z[k] - y[k], sums.products) : fmaf(f[k], y[k] - z[k], sums.products);
                }
            }
        };
        each_partner(Row<S>(p_.student, row()), y_, plan_.slot, plan_.side[0].size, add);
        return sums;
    }

    // Those of a usual chunk. Powers are relative to the largest logits of one of a thread's vectors, taken anew where
    // a vector's sum is too large; what that adds up is relative to the tops at last, by the same instructions, so that
    // the only pair of a row has the masses 1.
    __device__ PairSums compare_usual_pairs() const {
        constexpr float most = 0x1p10f;
        ScaledPowers z(p_.lowest, inverse_temperature_), y(p_.lowest, inverse_temperature_);
        float p = 0.0f, q = 0.0f, products = 0.0f;  // products: f times the difference of the logits
        const auto add = [&](int, const auto& x, const auto& slot, const auto& partner) {
            constexpr int N = sizeof(x) / sizeof(float);
            float own[N], other[N], e, f, product;  // the vector's sums
            const auto find_sums = [&] {
                e = f = product = 0.0f;
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    const float a = z.power(own[k]), b = y.power(other[k]);
                    if (slot[k] < 0) continue;
                    e += a;
                    f += b;
                    product = fmaf(b, other[k] - own[k], product);
                }
            };
#pragma unroll
            for (int k = 0; k < N; ++k) {
                own[k] = clamped(x[k]);
                other[k] = clamped(partner[k]);
            }
            find_sums();
            if (e + f > most) {
                float z_top = z.top, y_top = y.top;
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    z_top = fmaxf(z_top, slot[k] >= 0 ? own[k] : -INFINITY);
                    y_top = fmaxf(y_top, slot[k] >= 0 ? other[k] : -INFINITY);
                }
                p *= z.move(z_top);
                const float shrink = y.move(y_top);
                q *= shrink;
                products *= shrink;
                find_sums();
            }
            p += e;
            q += f;
            products += product;
        };
        each_partner(Row<S>(p_.student, row()), y_, plan_.slot, plan_.side[0].size, add);
        const float z_one = z.power(z.top), y_one = y.power(y.top);
        const float relative = products - __fmul_rn(q, y.top - z.top);
        return {z.top, y.top, p / z_one, q / y_one, relative / y_one};
    }

    // The sums relative to larger logits.
    __device__ PairSums moved(const PairSums& sums, float z_top, float y_top) const {
        const float z_step = z_top - sums.z_top, y_step = y_top - sums.y_top;
        const float z_shrink = student_exp(-z_step), y_shrink = teacher_exp(-y_step);
        const float products = p_.reverse ? z_shrink * fmaf(sums.p, y_step - z_step, sums.products)
                                          : y_shrink * fmaf(sums.q, z_step - y_step, sums.products);
        return {z_top, y_top, sums.p * z_shrink, sums.q * y_shrink, products};
    }

    // Adds logits, -inf for none, of which the largest, or that before, is `top`.
    template <int N>
    __device__ void add(const float (&x)[N], float top, bool precise, Mass& mass) const {
        if (top > mass.top) {
            mass.sum *= exponential(mass.top - top, precise);
            mass.top = top;
        }
        float e[N];
#pragma unroll
        for (int k = 0; k < N; ++k) e[k] = x[k] - top;
        exponentials(e, precise);
#pragma unroll
        for (int k = 0; k < N; ++k) mass.sum += e[k];
    }

    // Clamps the logits of tokens, -inf where there is none, if the lowest has mass beside `top`. find(is_token) says
    // where there are tokens.
    template <int N, typename Find>
    __device__ void clamp_unless(float top, float (&x)[N], Find find) const {
        if (outweighs_lowest(top)) return;
        bool is_token[N];
        find(is_token);
#pragma unroll
        for (int k = 0; k < N; ++k) x[k] = is_token[k] ? clamped(x[k]) : -INFINITY;
    }
    template <int N>
    __device__ static float largest_of(const float (&x)[N], float other) {
#pragma unroll
        for (int k = 0; k < N; ++k) other = fmaxf(other, x[k]);
        return other;
    }
    // Whether the lowest logit has no mass beside this one, at temperature 1.
    __device__ bool outweighs_lowest(float top) const { return top - p_.lowest > 104.0f; }

    // The mass of some tokens; by one thread.
    __device__ Mass sum_tokens(const AnyRow& row, const int32_t* tokens, int begin, int end) const {
        constexpr int together = 4;  // loads in flight
        Mass mass{p_.lowest, 0.0f};
#pragma unroll 1
        for (int i = begin; i < end; i += together) {
            int32_t some[together];
            float x[together];
#pragma unroll
            for (int k = 0; k < together; ++k) some[k] = i + k < end ? tokens[i + k] : -1;
            row.gather_or_lowest(some, x);
            const float top = largest_of(x, mass.top);
            clamp_unless(top, x, [&](bool (&is_token)[together]) {
#pragma unroll
                for (int k = 0; k < together; ++k) is_token[k] = some[k] >= 0;
            });
            add(x, top, row.precise(), mass);
        }
        return tempered(mass);
    }

    // Calls write(list, mass) with the masses of lists of tokens.
    template <typename R, typename Write>
    __device__ void sum_lists(const TokenLists& lists, const R& row, Write write) const {
        struct Logits {
            typename R::Element of[4];
        };
        const auto read_tokens = [](const Ring& ring, int32_t (&tokens)[4]) {
            uint32_t words[4];
            read_copied(ring.slot(0), words);
            memcpy(tokens, words, sizeof words);
        };
        Mass mass{p_.lowest, 0.0f};
        each_slice<Logits>(
            lists, [&](const Ring& ring, int at) { copy_async<16>(ring.slot(0), lists.tokens + at); },
            [&](const Ring& ring, Logits& ahead) {
                int32_t tokens[4];
                read_tokens(ring, tokens);
                row.gather_or_lowest(tokens, ahead.of);
            },
            [&](const Ring& ring, const Logits& ahead, auto next) {
                float x[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) x[k] = widen(ahead.of[k]);
                const float top = largest_of(x, mass.top);
                clamp_unless(top, x, [&](bool (&is_token)[4]) {
                    int32_t tokens[4];
                    read_tokens(ring, tokens);
#pragma unroll
                    for (int k = 0; k < 4; ++k) is_token[k] = tokens[k] >= 0;
                });
                next();
                add(x, top, row.precise(), mass);
            },
            [&](int list, bool of_all) {
                if (of_all) mass = warp_mass(mass, row.precise());
                if (list < lists.count && (!of_all || threadIdx.x % warp_size == 0)) write(list, tempered(mass));
                mass = {p_.lowest, 0.0f};
            });
    }

    // That of a warp's lanes together.
    __device__ Mass warp_mass(const Mass& mass, bool precise) const {
        float top = mass.top;
        for (int step = warp_size / 2; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(all_lanes, top, step));
        float sum = mass.sum * exponential(mass.top - top, precise);
        for (int step = warp_size / 2; step > 0; step /= 2) sum += __shfl_xor_sync(all_lanes, sum, step);
        return {top, sum};
    }

    // The teacher's probability of the event of its realised first token; by one thread.
    __device__ double start_probability() const {
        const int64_t token = *teacher_tokens();
        const int32_t event = plan_.number[token], place = plan_.place[plan_.side[1].event[token]];
        if (event == plan_.events || shared_.start.q == 0.0 || (place >= 0 && left_flags_[place] != 0)) return 0.0;
        return probability(event < 0 ? Mass{clamped(y_[token]), 1.0f} : start_.teacher[event], shared_.start);
    }

    // The gradient of tokens of the first row with logits x, these slots, and logits `partner` of the pairs' other
    // halves, without boundaries inside. Where x is below the lowest logit it is none.
    template <int N>
    __device__ void start_gradients(int i, const float (&x)[N], const int32_t (&slot)[N], const float (&partner)[N],
                                    float (&g)[N]) const {
        const Term& term = shared_.start;
#pragma unroll
        for (int k = 0; k < N; ++k) {
            const bool is_pair = slot[k] >= 0;
            g[k] = is_pair ? student_exp(x[k] - term.z_centre) * term.student
                           : gradient_of(start_.student[~slot[k]], x[k]);
            const float y = clamped(partner[k]) - term.y_centre, d = (clamped(x[k]) - term.z_centre) - y;
            if (mixed_ || p_.reverse) {
                const float mine = mixed_ ? slope(d, term) - term.mean_high : (d - term.mean_high) - term.mean_low;
                if (is_pair) g[k] *= mine;
            } else if (is_pair) {
                g[k] = fmaf(teacher_exp(y), -term.teacher, g[k]);
            }
            if (left_out_ && left_flags_[i + k] != 0) g[k] = 0.0f;
        }
    }

    // Those of a usual chunk at temperature 1, without a mixture and lowest logits; slopes are slopes[-slot].
    template <typename Masses, int N>
    __device__ static void usual_gradients(float z_top, const ScaledPowers& y, float student, float teacher,
                                           const Masses& slopes, const float (&x)[N], const int32_t (&slot)[N],
                                           const float (&partner)[N], float (&g)[N]) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
            const bool is_pair = slot[k] >= 0;
            Mass own{-z_top, student};
            if (!is_pair) own = slopes[-slot[k]];
            g[k] = fast_exp2((x[k] + own.top) * log2_e) * own.sum;
            if (is_pair) g[k] = fmaf(y.power(partner[k]), -teacher, g[k]);
        }
    }

    // Of an event's token, with what find_slopes leaves in the place of a mass: its top is added to an exponent.
    __device__ static float gradient_of(const Mass& slope, float x) {
        constexpr bool precise = sizeof(S) == 4;
        return exponential(x + slope.top, precise) * slope.sum;
    }

    // ---- any boundary ----

    // The teacher's probability of an event; by one thread.
    __device__ double probability(const Mass& mass, const Term& term) const {
        return static_cast<double>(teacher_exp(mass.top - term.y_centre)) * static_cast<double>(mass.sum) / term.q;
    }

    // The sums of a boundary, of its events and of pairs.
    __device__ BoundarySums sum_boundary(const Events& events, const PairSums& pairs) {
        const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
        float z_top = pairs.z_top, y_top = pairs.y_top;
        for (int n = events.begin + thread; n < events.end; n += threads) {
            z_top = fmaxf(z_top, events.student[n].top);
            y_top = fmaxf(y_top, events.teacher[n].top);
        }
        const float z_centre = block_max(z_top, shared_.sums), y_centre = block_max(y_top, shared_.sums);
        PairSums sums = moved(pairs, z_centre, y_centre);
        for (int n = events.begin + thread; n < events.end; n += threads) {
            const Mass student = events.student[n], teacher = events.teacher[n];
            const float a = student_exp(student.top - z_centre) * student.sum;
            const float b = teacher_exp(teacher.top - y_centre) * teacher.sum;
            const float d = difference(student, teacher, z_centre, y_centre);
            sums.p += a;
            sums.q += b;
            sums.products = p_.reverse ? fmaf(a, d, sums.products) : fmaf(b, -d, sums.products);
        }
        double totals[3] = {static_cast<double>(sums.p), static_cast<double>(sums.q),
                            static_cast<double>(sums.products)};
        block_sum(totals, shared_.sums);
        return {z_centre, y_centre, totals[0], totals[1], totals[2]};
    }

    // Adds the term of a boundary to the loss, and says in `term`, for all threads, what its gradient takes.
    __device__ void set_term(const BoundarySums& sums, Term& term) {
        if (threadIdx.x == 0) {
            term = {sums.z_centre, sums.y_centre, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, sums.p, sums.q};
            if (sums.p != 0.0) {  // else no event has tokens on both sides
                const double temperature = static_cast<double>(p_.temperature);
                const double mean = sums.products / (p_.reverse ? sums.p : sums.q);
                const double ratio = log(sums.p) - log(sums.q);
                if (!mixed_) shared_.loss += shared_.weight * (mean / temperature + (p_.reverse ? -ratio : ratio));
                const double scale = p_.scale == nullptr ? 1.0 : static_cast<double>(p_.scale[k_]);
                const double factor = shared_.weight * (p_.reverse ? scale : scale * temperature);
                term.student = static_cast<float>(factor / sums.p);
                term.teacher = static_cast<float>(factor / sums.q);
                term.mean_high = static_cast<float>(mean);
                term.mean_low = static_cast<float>(mean - static_cast<double>(term.mean_high));
                term.shift = static_cast<float>(ratio);
            }
        }
        __syncthreads();  // the term is there
    }

    // Of temperature (log a - log b), relative to the centres.
    __device__ MixedDivergence::Terms mixed(float difference, const Term& term) const {
        return divergence_(fmaf(-difference, inverse_temperature_, term.shift));
    }
    __device__ float slope(float difference, const Term& term) const {
        return divergence_.slope(mixed(difference, term));
    }

    // Adds the term of a divergence from a mixture, of the pairs too if it is the start's, and leaves the mean slope.
    __device__ void add_mixed_term(const Events& events, bool is_start, Term& term) {
        if (term.p == 0.0) return;
        const float per_a = static_cast<float>(1.0 / term.p), per_b = static_cast<float>(1.0 / term.q);
        float value = 0.0f, mean = 0.0f;
        const auto add = [&](float a, float b, float difference) {
            const MixedDivergence::Terms part = mixed(difference, term);
            value = fmaf(b, part.of_teacher, fmaf(a, part.of_student, value));
            mean = fmaf(a, divergence_.slope(part), mean);
        };
        for (int n = events.begin + static_cast<int>(threadIdx.x); n < events.end; n += static_cast<int>(blockDim.x)) {
            const Mass student = events.student[n], teacher = events.teacher[n];
            add(student_exp(student.top - term.z_centre) * student.sum * per_a,
                teacher_exp(teacher.top - term.y_centre) * teacher.sum * per_b,
                difference(student, teacher, term.z_centre, term.y_centre));
        }
        if (is_start) {
            each_vector(Row<S>(p_.student, row()), plan_.side[0].size, [&](int i, const auto& x) {
                constexpr int N = sizeof(x) / sizeof(float);
                int32_t slot[N];
                load_lanes(plan_.slot, i, slot);
                float y[N];
                y_.gather(slot, y);
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    if (slot[k] < 0 || (left_out_ && left_flags_[i + k] != 0)) continue;
                    const float z = clamped(x[k]) - term.z_centre, other = clamped(y[k]) - term.y_centre;
                    add(student_exp(z) * per_a, teacher_exp(other) * per_b, z - other);
                }
            });
        }
        double sums[2] = {static_cast<double>(value), static_cast<double>(mean)};
        block_sum(sums, shared_.sums);
        if (threadIdx.x == 0) {
            shared_.loss += shared_.weight * sums[0];
            term.mean_high = static_cast<float>(sums[1]);
        }
        __syncthreads();  // the mean is there
    }

    // temperature (log a - log b), relative to the centres.
    __device__ float difference(const Mass& student, const Mass& teacher, float z_centre, float y_centre) const {
        const float tops = (student.top - z_centre) - (teacher.top - y_centre);
        const float logs = logarithm(student.sum, sizeof(S) == 4) - logarithm(teacher.sum, sizeof(S) == 4);
        return fmaf(logs, p_.temperature, tops);
    }

    __device__ void find_slopes(const Events& events, const Term& term) const {
        for (int n = events.begin + static_cast<int>(threadIdx.x); n < events.end; n += static_cast<int>(blockDim.x)) {
            const Mass student = events.student[n], teacher = events.teacher[n];
            const float p = student_exp(student.top - term.z_centre) * term.student;
            if (student.top == nothing) {  // left out
                events.student[n] = {outweighs, 0.0f};
                continue;
            }
            float value;
            if (p_.reverse || mixed_) {
                const float d = difference(student, teacher, term.z_centre, term.y_centre);
                value = p * (mixed_ ? slope(d, term) - term.mean_high : (d - term.mean_high) - term.mean_low);
            } else {
                const float share = quotient(teacher.sum, student.sum, sizeof(S) == 4);
                value = fmaf(teacher_exp(teacher.top - term.y_centre) * -term.teacher, share, p);
            }
            events.student[n] = {-student.top, value};
        }
    }

    // ---- boundaries inside tokens ----

    // By one thread.
    __device__ void start_walks() {
        int length = 0;
        for (int i = 0; i < count(); ++i) length += plan_.side[0].length[student_tokens()[i]];
        for (int j = 0; j < teacher_count(); ++j) length -= plan_.side[1].length[teacher_tokens()[j]];
#pragma unroll 1
        for (int side = 0; side < 2; ++side) {
            shared_.walk[side].start();
            if (length == 0) {
                advance(side);
            } else {  // there is no inner boundary
                shared_.walk[side].whole = side == 0 ? count() : teacher_count();
            }
        }
    }
    __device__ void advance(int side) {
        const bool student = side == 0;
        shared_.walk[side].advance(plan_.side[side], student ? student_tokens() : teacher_tokens(),
                                   student ? count() : teacher_count(), plan_.side[1 - side],
                                   student ? teacher_tokens() : student_tokens(), student ? teacher_count() : count());
    }
    __device__ const int64_t* student_tokens() const { return p_.student_rows.next + row(); }
    __device__ const int64_t* teacher_tokens() const { return p_.teacher_rows.next + teacher_row(); }

    // The boundaries that look at row i of the student: before its token, or inside it.
    __device__ Inside compare_inside(int i) {
        Inside inside;
#pragma unroll 1  // one copy of the code
        for (int side = 0; side < 2; ++side) {
            for (;;) {
                const Walk walk = shared_.walk[side];
                if (side == 0 ? walk.whole != i : walk.whole == teacher_count() || walk.part != i) break;
                const Logits &whole = side == 0 ? p_.student : p_.teacher, &part = side == 0 ? p_.teacher : p_.student;
                const int64_t whole_row = (side == 0 ? row() : teacher_row()) + walk.whole;
                const int64_t part_row = (side == 0 ? teacher_row() : row()) + walk.part;
                compare_boundary(side, AnyRow(whole, whole_row), AnyRow(part, part_row), walk, inside);
                if (threadIdx.x == 0) advance(side);
                __syncthreads();  // the next one is there
            }
        }
        return inside;
    }

    __device__ void compare_boundary(int side, const AnyRow& whole_row, const AnyRow& part_row, const Walk& walk,
                                     Inside& inside) {
        const PrefixSide &whole = plan_.side[side], &part = plan_.side[1 - side];
        const int64_t* known = (side == 0 ? teacher_tokens() : student_tokens()) + walk.part - walk.depth;
        const auto order = [&](int place) {
            return compare_beginning(whole, part, whole.order[place], known, walk.depth);
        };
        const int first = first_not(0, whole.size, [&](int place) { return order(place) < 0; });
        const int last = first_not(first, whole.size, [&](int place) { return order(place) == 0; });
        const int32_t* tokens = whole.order + first;
        int count = find_events(whole, part, walk.depth, first, last - first);
        // What nobody can spell comes last.
        if (count > 0 && event_[count - 1] == INT32_MAX) --count;
        const bool has_ends = count > 0 && event_[0] < 0;
        // Where a merged event begins, one side ends for reasons of its own.
        const bool compares_ends = has_ends && plan_.merged[part.event[known[0]]] == 0;

        Mass *whole_mass = side == 0 ? inner_.student : inner_.teacher,
             *part_mass = side == 0 ? inner_.teacher : inner_.student;
        sum_events(whole_row, tokens, part_row, part, count, whole_mass, part_mass);
        if (side == 1 || compares_ends) mark(part, has_ends, count);
        if (compares_ends) {
            const Mass rest = remaining(part_row, part.size);
            if (threadIdx.x == 0) {
                // without mass, if no token is left to end with
                const Mass mass = rest.sum == 0.0f ? rest : tempered(rest);
                part_mass[0].top = mass.top;
                part_mass[0].sum = mass.sum;
            }
        }
        __syncthreads();  // the masses are there
        const int skipped = has_ends && (!compares_ends || part_mass[0].sum == 0.0f) ? 1 : 0;
        const Events events{inner_.student, inner_.teacher, skipped, count};
        set_term(sum_boundary(events, {p_.lowest, p_.lowest, 0.0f, 0.0f, 0.0f}), shared_.inner);
        if (mixed_) add_mixed_term(events, false, shared_.inner);
        if (p_.weighted && threadIdx.x == 0) {
            const int e = shared_.inner.q == 0.0 ? -1 : realised_event(side, walk, count);
            shared_.weight *= e < 0 || e < skipped ? 0.0 : probability(inner_.teacher[e], shared_.inner);
        }
        if (p_.grad.data == nullptr) return;
        find_slopes(events, shared_.inner);
        __syncthreads();  // the slopes are there
        if (side == 0) {
            if (walk.depth == 1) {
                inside.ids = tokens;
                inside.count = begin_[count];
            }
            spread(whole_row, tokens, values_ + (tokens - inside.ids), walk.depth == 1, count, skipped);
        } else {
            inside.marked = count;
            if (has_ends && skipped == 0) inside.ends = inner_.student[0];
        }
        __syncthreads();  // the values are there
    }

    // The masses of `count` events on both sides: of ranges of `tokens`, and of all tokens of the event; where tokens
    // end, which is no event, that of the range.
    __device__ void sum_events(const AnyRow& whole_row, const int32_t* tokens, const AnyRow& part_row,
                               const PrefixSide& part, int count, Mass* whole_mass, Mass* part_mass) const {
        for (int e = static_cast<int>(threadIdx.x); e < count; e += static_cast<int>(blockDim.x)) {
            const Mass mass = sum_tokens(whole_row, tokens, begin_[e], begin_[e + 1]);
            whole_mass[e].top = mass.top;
            whole_mass[e].sum = mass.sum;
            if (event_[e] >= 0) {
                const int32_t* at = part.by_event_ptr + event_[e];
                const Mass other = sum_tokens(part_row, part.by_event, at[0], at[1]);
                part_mass[e].top = other.top;
                part_mass[e].sum = other.sum;
            }
        }
    }

    // The place of the event of the teacher's realised token, -1 if it has none. By one thread.
    __device__ int realised_event(int side, const Walk& walk, int count) const {
        const PrefixSide &student = plan_.side[0], &teacher = plan_.side[1];
        const int64_t token = teacher_tokens()[side == 0 ? walk.part : walk.whole];
        const int32_t event = side == 0 ? teacher.event[token] : next_event(teacher, student, token, walk.depth);
        const int e = first_from(event_, count, event);
        if (e < count && event_[e] == event) return e;
        return side == 1 || event_[0] >= 0 ? -1 : 0;
    }

    // The event of a token's next piece after `depth`: -1 for none, INT32_MAX for one that nobody can spell.
    __device__ static int32_t next_event(const PrefixSide& whole, const PrefixSide& part, int64_t token, int depth) {
        const int32_t at = whole.ptr[token] + depth;
        if (at >= whole.ptr[token + 1]) return -1;
        const int32_t piece = whole.pieces[at];
        return piece < part.size ? part.event[piece] : INT32_MAX;
    }

    // The events of `size` tokens from order[first] on, into event_ and begin_: ranges with the same next one. Returns
    // how many.
    __device__ int find_events(const PrefixSide& whole, const PrefixSide& part, int depth, int first, int size) {
        const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
        const int lane = thread % warp_size, warp = thread / warp_size;
        const auto event_of = [&](int i) { return next_event(whole, part, whole.order[first + i], depth); };
        int count = 0;
        for (int base = 0; base < size; base += threads) {
            const int i = base + thread;
            const int32_t event = i < size ? event_of(i) : -1;
            const bool is_new = i < size && (i == 0 || event_of(i - 1) != event);
            const unsigned found = __ballot_sync(all_lanes, is_new);
            if (lane == 0) shared_.found[warp] = __popc(found);
            __syncthreads();  // the numbers are there
            int before = count;
            for (int w = 0; w < threads / warp_size; ++w) {
                before += w < warp ? shared_.found[w] : 0;
                count += shared_.found[w];
            }
            if (is_new) {
                const int e = before + __popc(found & ((1u << lane) - 1u));
                event_[e] = event;
                begin_[e] = i;
            }
            __syncthreads();  // the numbers may be overwritten
        }
        if (thread == 0) begin_[count] = size;
        __syncthreads();  // the events are there
        return count;
    }

    // Sets the bits of a side's tokens in the events event_[first] ... event_[count - 1].
    __device__ void mark(const PrefixSide& side, int first, int count) {
        const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
        for (int word = thread; word < (side.size + 31) / 32; word += threads) bits_[word] = 0;
        __syncthreads();  // all bits are clear
        for (int e = first + thread; e < count; e += threads) {
            for (int i = side.by_event_ptr[event_[e]]; i < side.by_event_ptr[event_[e] + 1]; ++i) {
                const int32_t token = side.by_event[i];
                atomicOr(bits_ + token / 32, 1u << token % 32);
            }
        }
        __syncthreads();  // the bits are there
    }
    __device__ bool is_marked(int token) const { return (bits_[token / 32] >> token % 32 & 1u) != 0; }

    // The mass of the tokens of a row that are not marked.
    __device__ Mass remaining(const AnyRow& row, int size) {
        Mass mass{p_.lowest, 0.0f};
        each_vector(row, size, [&](int i, const auto& x) {
            constexpr int N = sizeof(x) / sizeof(float);
            float kept[N];
#pragma unroll
            for (int k = 0; k < N; ++k) kept[k] = is_marked(i + k) ? -INFINITY : clamped(x[k]);
            add(kept, largest_of(kept, mass.top), row.precise(), mass);
        });
        const float top = block_max(mass.top, shared_.sums);
        const float shrink = exponential(mass.top - top, row.precise());
        double sums[1] = {static_cast<double>(mass.sum) * static_cast<double>(shrink)};
        block_sum(sums, shared_.sums);
        return {top, static_cast<float>(sums[0])};
    }

    // The slopes of events of several tokens as gradients of these, into values, or added to them: deeper boundaries
    // inside the same token have some of the tokens of the first.
    __device__ void spread(const AnyRow& row, const int32_t* tokens, float* values, bool is_first, int count,
                           int skipped) const {
        for (int e = static_cast<int>(threadIdx.x); e < count; e += static_cast<int>(blockDim.x)) {
            const Mass own = inner_.student[e];
            for (int i = begin_[e]; i < begin_[e + 1]; ++i) {
                const float g = e < skipped ? 0.0f : gradient_of(own, clamped(row[tokens[i]]));
                values[i] = is_first ? g : values[i] + g;
            }
        }
    }

    // ---- the gradient ----

    // Row i of the student: the gradient, and the cross-entropy of its label.
    __device__ void write(int i, const Inside& inside) const {
        const int64_t r = row() + i;
        const Row<S> z(p_.student, r);
        const int size = plan_.side[0].size;
        const bool known = i == 0 && p_.temperature == 1.0f && !left_out_;
        const LabelTerm label =
            label_term(p_.labels, r, z, size, p_.lowest, shared_.sums, known, known ? all_tokens() : Statistics{});
        if (p_.grad.data == nullptr) return;
        S* grad = row_of<S>(p_.grad, r);
        if (inside.count > 0) {
            complete(i == 0, z, label, inside);
            __syncthreads();  // the gradient may take the place of the logits
        }
        if (i > 0) {
            write_row(z, grad, size, p_.grad.width, [&](int s, const auto& x, auto& g) {
                inner_gradients(s, x, inside, g);
                finish(label, s, x, g);
            });
        } else if (is_usual() && !tempered_ && !mixed_ && outweighs_lowest(shared_.start.y_centre)) {
            if (are_shared_) {
                write_usual_start(z, grad, label, InShared<Mass>(start_.student - 1));
            } else {
                write_usual_start(z, grad, label, start_.student - 1);
            }
        } else {
            write_start(z, grad, label, [&](int s, const auto& x, const auto& slot, const auto& partner, auto& g) {
                start_gradients(s, x, slot, partner, g);
            });
        }
        if (inside.count == 0) return;
        __syncthreads();  // the row is there
        for (int n = static_cast<int>(threadIdx.x); n < inside.count; n += static_cast<int>(blockDim.x)) {
            narrow(values_[n], grad[inside.ids[n]]);
        }
    }

    // Adds to the sparse part of a row's gradient what the tokens have otherwise.
    __device__ void complete(bool is_start, const Row<S>& z, const LabelTerm& label, const Inside& inside) const {
        for (int n = static_cast<int>(threadIdx.x); n < inside.count; n += static_cast<int>(blockDim.x)) {
            const int32_t token = inside.ids[n];
            const float x[1] = {z[token]};
            float g[1] = {0.0f};
            if (is_start) {
                const int32_t slot[1] = {plan_.slot[token]};
                float partner[1];
                y_.gather(slot, partner);
                start_gradients(token, x, slot, partner, g);
            }
            g[0] += values_[n];
            finish(label, token, x, g);
            values_[n] = g[0];
        }
    }

    // The first row, with the pairs' other halves.
    template <typename Gradients>
    __device__ void write_start(const Row<S>& z, S* grad, const LabelTerm& label, Gradients gradients) const {
        const int size = plan_.side[0].size;
        write_row(
            z, grad, size, p_.grad.width, [&](auto body) { each_partner(z, y_, plan_.slot, size, body); },
            [&](int s, const auto& x, const auto& slot, const auto& partner, auto& g) {
                gradients(s, x, slot, partner, g);
                finish(label, s, x, g);
            });
    }
    template <typename Masses>
    __device__ void write_usual_start(const Row<S>& z, S* grad, const LabelTerm& label, const Masses& slopes) const {
        const Term& term = shared_.start;
        const ScaledPowers other(term.y_centre, 1.0f);
        const float z_top = term.z_centre, student = term.student, teacher = term.teacher / other.power(other.top);
        write_start(z, grad, label, [=](int, const auto& x, const auto& slot, const auto& partner, auto& g) {
            usual_gradients(z_top, other, student, teacher, slopes, x, slot, partner, g);
        });
    }

    // The gradient of tokens of another row than the first, but for its sparse part.
    template <int N>
    __device__ void inner_gradients(int s, const float (&x)[N], const Inside& inside, float (&g)[N]) const {
#pragma unroll
        for (int k = 0; k < N; ++k) g[k] = 0.0f;
        if (inside.ends.sum != 0.0f) {
#pragma unroll
            for (int k = 0; k < N; ++k) g[k] = gradient_of(inside.ends, clamped(x[k]));
        }
        if (inside.marked != 0) {
#pragma unroll
            for (int k = 0; k < N; ++k) {
                if (is_marked(s + k)) g[k] = inner_gradient(s + k, x[k], inside.marked);
            }
        }
    }

    // Of a token that is an event inside a token, one of so many, or one of several.
    __device__ float inner_gradient(int token, float x, int events) const {
        return gradient_of(inner_.student[first_from(event_, events, plan_.side[0].event[token])], clamped(x));
    }

    template <int N>
    __device__ void finish(const LabelTerm& label, int s, const float (&x)[N], float (&g)[N]) const {
        float least = x[0];
#pragma unroll
        for (int k = 1; k < N; ++k) least = fminf(least, x[k]);
        if (least < p_.lowest) {
#pragma unroll
            for (int k = 0; k < N; ++k) g[k] = x[k] < p_.lowest ? 0.0f : g[k];
        }
        label.add(s, x, g);
    }

    // Statistics of the first row at temperature 1.
    __device__ Statistics all_tokens() const {
        const float top = fmaxf(shared_.start.z_centre, shared_.unmatched.top);
        const double events = shared_.start.p * static_cast<double>(student_exp(shared_.start.z_centre - top));
        const float others = shared_.unmatched.sum * student_exp(shared_.unmatched.top - top);
        return {{sizeof(S) == 4, top, p_.lowest, 1.0f}, events + static_cast<double>(others), 0.0};
    }

    const PrefixParams& p_;
    const PrefixPlan& plan_;
    Shared& shared_;
    const int64_t& k_;
    float inverse_temperature_;
    bool tempered_, mixed_;
    MixedDivergence divergence_;
    AnyRow y_;  // the teacher's first row
    Events start_, inner_;
    Mass* listed_;             // those of the teacher's lists
    bool are_shared_;          // the student's of the start, in shared memory
    int32_t *event_, *begin_;  // of the events inside a token: which it is, and the first token of the range
    float* values_;            // the sparse part of a row's gradient
    uint8_t* left_flags_;      // of the student's tokens in pairs that are left out
    bool left_out_ = false;
    unsigned* bits_;  // of the tokens that are events inside a token of the other side
};

// `ring_bytes` of dynamic shared memory are followed by room for the masses of the student's events; 0: there is none.
template <typename S>
__global__ __launch_bounds__(max_threads,
                             resident_blocks) void prefix_kernel(const __grid_constant__ PrefixParams params,
                                                                 int32_t ring_bytes) {
    XTOKEN_SHARED(shared, Shared);
    XTOKEN_DYNAMIC_SHARED(char, memory);
    float* masses = ring_bytes > 0 ? reinterpret_cast<float*>(memory + ring_bytes) : nullptr;
    if (blockIdx.x < params.chunks) Chunk<S>(params, blockIdx.x, shared, masses).clear_flags();
    each_chunk(params, [&](const int64_t& k) { Chunk<S>(params, k, shared, masses).run(); });
}

int64_t workspace_of(const PrefixParams& params) { return Workspace(params.plan).total(); }

// Each chunk by one block; rows of the gradient that belong to no chunk are not touched.
void prefix(const PrefixParams& params, const Launch& launch) {
    typed(params.student.type, [&](const auto* s) {
        using S = std::remove_const_t<std::remove_pointer_t<decltype(s)>>;
        // boundaries inside the teacher's tokens pass over rows of the student; each_partner has a table beside a row
        const int slots =
            std::max({AnyRow::slots(params.student.type), AnyRow::slots(params.teacher.type), 1 + Row<S>::vector / 4});
        const size_t ring = Ring::bytes(slots);
        const size_t masses = sizeof(float) * static_cast<size_t>(Workspace(params.plan).masses);
        const bool fits = ring + masses + sizeof(Shared) + queue_bytes <= shared_memory_of_a_block();
        launch_chunks("prefix_kl", prefix_kernel<S>, fits ? ring + masses : ring, launch, params,
                      static_cast<int32_t>(fits ? ring : 0));
    });
}

const Launcher launcher("prefix_kl", &prefix, &workspace_of);

}  // namespace

}  // namespace xtoken::cuda
