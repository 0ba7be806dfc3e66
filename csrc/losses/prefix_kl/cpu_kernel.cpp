// Prefix KL of one chunk. The formula is that of xtoken.reference.prefix.
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
// At the start of a chunk the teacher's exponentials f are put into memory, then those of the student, e. With x, f of
// a pair's partner, the pair's gradient is e / A - x / B; x is stored only where it is gathered, else f is loaded
// again. All are in order, and relative to one logit of each side, near the largest that counts. Events of several
// tokens are lists: their a and b are gathered sums of e and f, and the gradient of their tokens is e h, h = 1 / A - b
// / (a B). Where a is so small that this is not exact, the list is read again, relative to its own largest logit
// ("top"). For the reverse f and x are logarithms: x = tau D. With a temperature or a mixture every list is read so, at
// temperature 1, and e becomes the share of a token in its list. With a mixture x is tau log b, and then P s.
//
// Inside of tokens every event has its own top and the sum of the exponentials relative to it.
#include "cpu/divergence.h"
#include "cpu/rows.h"
#include "losses/prefix_kl/params.h"

namespace xtoken::cpu::XTOKEN_LEVEL {
namespace {

constexpr float nothing = -1e30f;  // below every logit, and finite less the largest float

template <typename T>
T* take(char*& at, int64_t count) {
    T* result = reinterpret_cast<T*>(at);
    at += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return result;
}

constexpr float none_left = -1e30f;  // tau log b where b is 0
constexpr float least = 1e-30f;      // sums of exponentials below it are not exact

// What makes a gradient: student * e - teacher * f, or the reverse student * e (tau D - mean).
struct Slope {
    float student = 0.0f, teacher = 0.0f, mean_high = 0.0f, mean_low = 0.0f;
};

// The exponentials of one side of a boundary.
struct Side {
    Exponential exp;
    float centre;       // a logit that they are relative to
    double total;       // of the events that both sides have, without those that are left out
    double left = 1.0;  // 0 if the exponentials of what does not count are zeros
};

// The largest tau log a and tau log b of the lists, relative to the centres.
struct ListTops {
    float a, b;
};

// Functions, not constants: nothing of a level may run before it is chosen.
Exponential any_exponential() { return Exponential::around(0.0f, 0.0f, 1.0); }
Normaliser no_normaliser() { return {any_exponential(), 0.0f, 0.0}; }

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

int64_t longest(const TokensView& lists) { return lists.slices == 0 ? 0 : lists.start[1]; }

// Calls body(i, x, n) with the elements of `row` that are the tokens i of the lists of slice k, in n lanes.
template <typename T, typename Body>
inline void each_token(const TokensView& lists, int64_t k, const T* row, Body body) {
    const int64_t begin = lists.start[k];
    for (int64_t i = begin; i < lists.start[k + 1]; ++i) {
        body(i - begin, gather(row, lists.tokens + lanes * i), lists.lanes[i]);
    }
}

inline float first_lane(Floats x) {
    alignas(64) float lane[lanes];
    store(lane, x);
    return lane[0];
}

// Lanes from n on become `fill`.
inline Floats only(int64_t n, Floats x, Floats fill) { return n == lanes ? x : select(first(n), x, fill); }

// Events with tops and sums of both sides, in arrays padded to whole vectors.
struct Events {
    float *z_top, *z_sum, *y_top, *y_sum;
    float* slope;  // out: d loss / d log a, divided by z_sum
};

// One side of a boundary inside of tokens: its row, and where tops and sums of its events go.
struct InnerSide {
    Element type;
    const void* row;
    float *top, *sum;
};

// A row without the tokens whose bit is set.
template <typename T>
struct RemainingRow {
    static constexpr bool is_rough = sizeof(T) == 2;
    const T* p;
    const uint16_t* without;  // [ceil(width / 16)]
    float lowest;
    Floats at(int64_t i) const {
        prefetch(p + i + ahead);
        return remaining(i, load(p + i));
    }
    Floats tail(int64_t i, int64_t n) const { return remaining(i, load(p + i, n, broadcast(0.0f))); }
    Floats remaining(int64_t i, Floats x) const {
        x = at_least(x, lowest);
        const uint32_t gone = without[i / lanes];
        return gone == 0 ? x : select(from_bits(gone), broadcast(nothing), x);
    }
};

// A sparse part of a row's gradient; blocks of 16 are cleared when they are first added to.
class Additions {
  public:
    Additions(float* values, uint16_t* touched, int64_t blocks) : values_(values), touched_(touched), blocks_(blocks) {}
    void clear() {
        if (any_) memset(touched_, 0, static_cast<size_t>(blocks_) * sizeof(uint16_t));
        any_ = false;
    }
    void add(int32_t token, float x) {
        if (!any_) memset(touched_, 0, static_cast<size_t>(blocks_) * sizeof(uint16_t));
        any_ = true;
        const int64_t block = token / lanes;
        if (touched_[block] == 0) store(values_ + lanes * block, broadcast(0.0f));
        touched_[block] = 1;
        values_[token] += x;
    }
    bool any() const { return any_; }
    Floats to(int64_t i, Floats x) const { return any_ && touched_[i / lanes] != 0 ? x + load(values_ + i) : x; }

  private:
    float* values_;
    uint16_t* touched_;
    int64_t blocks_;
    bool any_ = false;
};

class Chunk {
  public:
    Chunk(const PrefixChunks& p, int64_t k, char* at)
        : p_(p),
          plan_(*p.plan),
          k_(k),
          size_(p.student.width),
          wanted_(p.grad.data != nullptr),
          tempered_(p.temperature != 1.0),
          mixed_(p.divergence.is_mixed()),
          logarithms_(p.reverse || mixed_),
          exact_lists_(tempered_ || mixed_),
          e_(take<float>(at, padded(size_))),
          x_(take<float>(at, padded(size_))),
          f_(take<float>(at, padded(p.teacher.width) + lanes)),
          slice_(take<float>(at, lanes * larger(longest(plan_.student.lists), longest(plan_.teacher.lists)))),
          teacher_sum_(take<float>(at, padded(plan_.events))),
          h_(take<float>(at, padded(plan_.events) + lanes)),
          others_(take<float>(at, padded(plan_.others) + lanes)),
          inner_(take_events(at, p.most + 1)),
          event_(take<int32_t>(at, p.most + 1)),
          begin_(take<int32_t>(at, p.most + 2)),
          values_(take<float>(at, padded(p.most))),
          tokens_(take<int32_t>(at, padded(p.most))),
          left_out_(take<int32_t>(at, plan_.student.most_known + plan_.teacher.most_known)),
          left_lists_(take<uint16_t>(at, padded(plan_.events) / lanes)),
          without_(take<uint16_t>(at, padded(larger(p.student.width, p.teacher.width)) / lanes)),
          additions_(take<float>(at, padded(size_)), take<uint16_t>(at, padded(size_) / lanes), padded(size_) / lanes) {
    }

    void run() {
        const int64_t start = p_.student_rows.start[k_], count = p_.student_rows.count[k_];
        const double square = p_.temperature * p_.temperature;
        scale_ = p_.scale == nullptr ? 1.0 : p_.scale[k_];
        for (int64_t r = start; r < start + count; ++r) {
            typed(p_.student.type, p_.student.row(r), [&](const auto* z) {
                additions_.clear();
                if (r == start) {
                    first_row(r, z);
                } else {
                    later_row(r, z);
                }
            });
        }
        p_.losses[k_] = loss_ * square;
    }

  private:
    static Events take_events(char*& at, int64_t count) {
        Events events;
        for (float** values : {&events.z_top, &events.z_sum, &events.y_top, &events.y_sum, &events.slope}) {
            *values = take<float>(at, padded(count));
        }
        return events;
    }

    // The first row: the events at the start of the chunk, and boundaries inside the first token.
    template <typename S>
    void first_row(int64_t r, const S* z) {
        double product = 0;  // sum of b tau D, or the reverse's a tau D
        bool low = false;
        Normaliser all = no_normaliser();
        const int64_t token = p_.teacher_rows.next[p_.teacher_rows.start[k_]];
        const int32_t event = plan_.index.side[1].event[token];
        weight_ = plan_.index.side[0].event[p_.student_rows.next[r]] == event ? 1.0 : 0.0;
        find_left_out();
        Side q{any_exponential(), 0.0f, 0.0};
        with_teacher([&](const auto* y) { q = teacher_start(y, &product); });
        if (!exact_lists_ && !p_.reverse) sum_teacher_lists();
        Side p = student_start(z, &product, &all, &low);
        const bool counts = p.total != 0;  // else there is no event that both sides have and that is not left out
        if (exact_lists_) leave_out(0.0f, mixed_ ? none_left : 0.0f, logarithms_ ? none_left : 0.0f);
        ListTops tops{};
        if (exact_lists_) {
            with_teacher([&](const auto* y) { exact_teacher_lists(y, q); });
            tops = exact_lists(z, p, q, &product);
        } else {
            product += p_.reverse ? reverse_lists() : forward_lists(z, p, q);
        }
        Slope slope;
        if (counts) {
            slope = mixed_ ? add_mixed_term(z, p, q, tops) : add_term(p.total, q.total, product);
            if (tempered_ && !mixed_) find_slopes(tops, slope, p.total, q.total);
        } else {
            for (int64_t e = 0; e < plan_.events; e += lanes) store(h_ + e, broadcast(0.0f));
        }
        if (!exact_lists_ && wanted_) {  // the label's part needs e: x makes up for it, wherever it is read
            each_left_pair([&](int32_t s, int32_t t) {
                x_[s] = p_.reverse              ? slope.mean_high
                        : slope.teacher == 0.0f ? 0.0f
                                                : e_[s] * slope.student / slope.teacher;
                f_[t] = x_[s];
            });
        }
        weight_ = p_.weighted ? probability(token, event, q.total) : 1.0;
        inside(r);
        const LabelTerm label = label_of(r, z, all.total > 0 ? &all : nullptr);
        if (!wanted_) return;
        spread_lists(slope);
        const Floats student = broadcast(slope.student), teacher = broadcast(slope.teacher);
        const Floats high = broadcast(slope.mean_high), mean_low = broadcast(slope.mean_low);
        const bool same = label.present && all.total > 0 && !exact_lists_, plain = !low && !additions_.any(),
                   reverse = p_.reverse, logarithms = logarithms_;
        const float *others = others_, *es = e_, *xs = x_, *fs = f_;
        const int32_t* partner_run = plan_.partner_run;
        const uint16_t* paired_bits = plan_.student.paired_bits;
        // otherwise it becomes a call for each vector; so do the bodies below
        write_row(Target{p_.grad.row(r), size_, p_.grad.width}, z, [&](int64_t i) __attribute__((always_inline)) {
            const int64_t run = partner_run[i / lanes], in_x = logarithms ? -1 : run >> 63;
            // a choice without a branch, which would be mispredicted
            const Floats e = load(es + i), x = load(fs + ((run & ~in_x) | ((xs - fs + i) & in_x)));
            Floats g = reverse ? e * student * ((x - high) - mean_low) : fnma(x, teacher, e * student);
            const uint32_t paired = paired_bits[i / lanes], rest = ~paired & 0xFFFFu;
            if (expand_is_quick || rest != 0) {
                g = select(from_bits(paired), g, e * expand(others, from_bits(rest)));
                others += __builtin_popcount(rest);
            }
            if (!plain) g = unless_raised(tail_load(z, i), p_.lowest, additions_.to(i, g));
            return label.present ? with_label(label, i, same ? e : label.exp(tail_load(z, i)), g) : g;
        });
    }

    // Calls body(y) with the teacher's row. What it calls is not to be inlined: once for each type is enough, not once
    // for each pair of types.
    template <typename Body>
    void with_teacher(Body body) {
        typed(p_.teacher.type, p_.teacher.row(p_.teacher_rows.start[k_]), body);
    }

    // f of the teacher's row, and the pairs' part of sum b log b.
    template <typename T>
    __attribute__((noinline)) Side teacher_start(const T* y, double* product) {
        DoubleSum products;
        Floats part = broadcast(0.0f);
        const Side side = start_side(
            y, p_.teacher.width, plan_.teacher, nullptr,
            [&](int64_t i, Floats f, Floats relative, Floats cut) __attribute__((always_inline)) {
                if (i == 0) {
                    products = DoubleSum();
                    part = broadcast(0.0f);
                }
                store(f_ + i, logarithms_ ? relative : f);
                part = fma(select(from_bits(plan_.teacher.paired_bits[i / lanes]), f, broadcast(0.0f)), cut, part);
                if (i % flush == flush - lanes) {
                    products.add(part);
                    part = broadcast(0.0f);
                }
            });
        products.add(part);
        if (!p_.reverse) *product += products.total();
        store(f_ + padded(p_.teacher.width), broadcast(0.0f));
        each_left_pair([&](int32_t, int32_t t) {
            if (!p_.reverse && side.left != 0) {  // else its exponential may be infinite, and is not in the product
                const Floats x = side.exp.relative(broadcast(at_least(widened(y[t]), p_.lowest)));
                *product -= static_cast<double>(first_lane(side.exp.of_relative(x) * x));
            }
            f_[t] = 0.0f;
        });
        return side;
    }

    // e and the pairs' x of the student's row, and the pairs' part of - sum b log a, or of the reverse's sum a D. `all`
    // receives the normaliser of the whole row, if the temperature is 1 and there is one; `low` whether there may be
    // logits below the lowest.
    template <typename S>
    Side student_start(const S* z, double* product, Normaliser* all, bool* low) {
        DoubleSum products;
        Floats part = broadcast(0.0f), bottom = part;
        const Side side = start_side(z, size_, plan_.student, all,
                                     [&](int64_t i, Floats e, Floats relative, Floats) __attribute__((always_inline)) {
                                         if (i == 0) {
                                             products = DoubleSum();
                                             part = broadcast(0.0f);
                                             bottom = relative;
                                         }
                                         const int32_t run = plan_.partner_run[i / lanes];
                                         const Mask paired = from_bits(plan_.student.paired_bits[i / lanes]);
                                         Floats x;
                                         if (run < 0) {
                                             x = gather(f_, plan_.partner + i);
                                             store(x_ + i, x);
                                         } else {
                                             x = select(paired, load(f_ + run), broadcast(0.0f));
                                         }
                                         if (p_.reverse) {
                                             x = relative - x;
                                             part = fma(select(paired, e, broadcast(0.0f)), x, part);
                                         } else {
                                             part = fnma(x, relative, part);
                                         }
                                         store(e_ + i, e);
                                         if (logarithms_) store(x_ + i, x);
                                         bottom = min(relative, bottom);
                                         if (i % flush == flush - lanes) {
                                             products.add(part);
                                             part = broadcast(0.0f);
                                         }
                                     });
        products.add(part);
        *product += products.total();
        if (p_.reverse) {
            each_left_pair([&](int32_t s, int32_t) {
                *product -= side.left * static_cast<double>(e_[s]) * static_cast<double>(x_[s]);
            });
        }
        *low = -largest(broadcast(0.0f) - bottom) <= p_.lowest - side.centre;
        return side;
    }

    // One side at the start of a chunk: calls body as each_exponential does. `all`: see above.
    template <typename T, typename Body>
    Side start_side(const T* row, int64_t size, const StartView& start, Normaliser* all, Body body) const {
        const double tau = p_.temperature;
        const Normaliser whole = each_exponential(WholeRow<T>{row}, size, p_.lowest, tau, body);
        DoubleSum absent;
        for (int64_t i = 0; i < start.absent_count; i += lanes) {
            const Floats e = whole.exp(gather(row, start.absent + i));
            absent.add(select(first(start.absent_count - i), e, broadcast(0.0f)));
        }
        double total = whole.total - absent.total();
        each_left(start, [&](int32_t token) {
            total -= static_cast<double>(first_lane(whole.exp(broadcast(at_least(widened(row[token]), p_.lowest)))));
        });
        if (total > whole.total / 2) {
            if (all != nullptr && tau == 1.0) *all = whole;
            return {whole.exp, whole.centre, total, 1.0};
        }
        // most of the mass is on tokens that do not count: their exponentials are no measure for the others
        memcpy(without_, start.absent_bits, static_cast<size_t>(padded(size) / lanes) * sizeof(uint16_t));
        each_left(start, [&](int32_t token) { without_[token / lanes] |= static_cast<uint16_t>(1u << token % lanes); });
        const RemainingRow<T> rest{row, without_, p_.lowest};
        const Normaliser counted = each_exponential(rest, size, nothing, tau, body);
        const bool none = counted.centre == nothing && counted.total == static_cast<double>(size);  // all are `nothing`
        return {counted.exp, counted.centre, none ? 0.0 : counted.total, 0.0};
    }

    // The events that are left out at the start: of which one tokenizer knows that they do not follow, and the other
    // does not, or not of all that is merged in them.
    void find_left_out() {
        const StartView &s = plan_.student, &t = plan_.teacher;
        const int64_t own = p_.student_rows.before[k_], other = p_.teacher_rows.before[k_];
        const bool has_own = own >= 0 && own < size_, has_other = other >= 0 && other < p_.teacher.width;
        int64_t i = has_own ? s.known_ptr[own] : 0, j = has_other ? t.known_ptr[other] : 0;
        const int64_t end = has_own ? s.known_ptr[own + 1] : 0, other_end = has_other ? t.known_ptr[other + 1] : 0;
        left_count_ = 0;
        while (i < end || j < other_end) {
            const int32_t a = i < end ? s.known[i] : INT32_MAX, b = j < other_end ? t.known[j] : INT32_MAX;
            i += a <= b;
            j += b <= a;
            if (a == b && plan_.merged[a] == 0) continue;
            left_out_[left_count_++] = a < b ? a : b;
        }
        if (left_count_ == 0) return;
        memset(left_lists_, 0, static_cast<size_t>(padded(plan_.events) / lanes) * sizeof(uint16_t));
        for (int64_t n = 0; n < left_count_; ++n) {
            const int32_t place = s.of_event[left_out_[n]];
            if (place >= 0 || place == absent_event) continue;
            const int32_t list = -1 - place;
            left_lists_[list / lanes] |= static_cast<uint16_t>(1u << list % lanes);
        }
    }

    // Calls body(token) with one side's tokens of the events that are left out.
    template <typename Body>
    void each_left(const StartView& side, Body body) const {
        for (int64_t n = 0; n < left_count_; ++n) {
            const int32_t event = left_out_[n];
            if (side.of_event[event] == absent_event) continue;
            each_token_of(side, event, body);
        }
    }

    // Calls body(student token, teacher token) with the pairs that are left out.
    template <typename Body>
    void each_left_pair(Body body) const {
        for (int64_t n = 0; n < left_count_; ++n) {
            const int32_t s = plan_.student.of_event[left_out_[n]];
            if (s >= 0) body(s, plan_.teacher.of_event[left_out_[n]]);
        }
    }

    // The pairs that are left out as if they had no mass.
    void leave_out(float e, float x, float f) {
        each_left_pair([&](int32_t s, int32_t t) {
            e_[s] = e;
            x_[s] = x;
            f_[t] = f;
        });
    }

    // Which of 16 lists of the student count.
    Mask counted(int64_t k) const {
        const Mask all = first(plan_.events - lanes * k);
        return left_count_ == 0 ? all : from_bits(bits(all) & ~uint32_t{left_lists_[k]});
    }

    // The teacher's probability of the event of its token, 0 if that is left out.
    double probability(int64_t token, int32_t event, double total) const {
        const auto has = [&](const uint16_t* bits) { return (bits[token / lanes] >> token % lanes & 1) != 0; };
        bool counts = !has(plan_.teacher.absent_bits);
        for (int64_t n = 0; n < left_count_; ++n) counts = counts && left_out_[n] != event;
        if (!counts) return 0.0;
        const bool pair = has(plan_.teacher.paired_bits);
        const double b = static_cast<double>(pair ? f_[token] : teacher_sum_[-1 - plan_.teacher.of_event[event]]);
        return (logarithms_ || (exact_lists_ && !pair) ? ::exp(b / p_.temperature) : b) / total;
    }

    // The lists' sums of f; while f is in the caches.
    void sum_teacher_lists() {
        const TokensView& teacher = plan_.teacher.lists;
        const Floats zero = broadcast(0.0f);
        for (int64_t k = 0; k < teacher.slices; ++k) {
            Floats b = zero;
            each_token(teacher, k, f_, [&](int64_t, Floats f, int64_t n) { b += only(n, f, zero); });
            store(teacher_sum_ + lanes * k, b);
        }
    }

    // The lists' part of sum b D, and h; for temperature 1 and no mixture.
    template <typename S>
    double forward_lists(const S* z, const Side& p, const Side& q) {
        const TokensView& student = plan_.student.lists;
        const Floats zero = broadcast(0.0f), smallest = broadcast(least);
        const Slope slope = slope_of(p.total, q.total, 0);
        const Floats per_a = broadcast(slope.student), per_b = broadcast(slope.teacher);
        DoubleSum products;
        for (int64_t k = 0; k < student.slices; ++k) {
            const Mask valid = counted(k);
            Floats a = zero;
            each_token(student, k, e_, [&](int64_t, Floats e, int64_t n) { a += only(n, e, zero); });
            a = select(valid, a, broadcast(1.0f));
            const Floats b = select(valid, gather(teacher_sum_, plan_.teacher_list + lanes * k), zero);
            Floats log_a = log(a), h = per_a - b * per_b / a;
            if (bits(greater(smallest, a)) != 0) {
                const Floats top = exact_sums(student, k, z, p_.lowest, &a);
                log_a = log(a) + (top - broadcast(p.centre));
                if (wanted_) {
                    each_share(student, k, zero - b * per_b / a,
                               [&](int32_t token, float x) { additions_.add(token, x); });
                }
                h = per_a;
            }
            store(h_ + lanes * k, select(valid, h, zero));
            products.add(b * (log(max(smallest, b)) - log_a));
        }
        return products.total();
    }

    // The lists' part of sum a D, and D as h; for temperature 1 and no mixture.
    double reverse_lists() {
        const TokensView &student = plan_.student.lists, &teacher = plan_.teacher.lists;
        const Floats zero = broadcast(0.0f);
        for (int64_t k = 0; k < teacher.slices; ++k) {
            Floats b;
            const Floats top = exact_sums(teacher, k, f_, nothing, &b);
            store(teacher_sum_ + lanes * k, log(b) + top);
        }
        DoubleSum products;
        for (int64_t k = 0; k < student.slices; ++k) {
            Floats a = zero;
            each_token(student, k, e_, [&](int64_t, Floats e, int64_t n) { a += only(n, e, zero); });
            const Floats log_b = gather(teacher_sum_, plan_.teacher_list + lanes * k);
            const Floats d = log(max(broadcast(least), a)) - log_b;
            products.add(select(counted(k), a * d, zero));
            store(h_ + lanes * k, d);
        }
        return products.total();
    }

    // For all else: the teacher's lists' tau log b as teacher_sum_, relative to the centre.
    template <typename T>
    __attribute__((noinline)) void exact_teacher_lists(const T* y, const Side& q) {
        const TokensView& teacher = plan_.teacher.lists;
        for (int64_t k = 0; k < teacher.slices; ++k) {
            Floats sum;
            const Floats top = exact_sums(teacher, k, y, p_.lowest, &sum);
            store(teacher_sum_ + lanes * k, log(sum) + (top - broadcast(q.centre)));
        }
    }

    // Then the student's tau log a as h, and e as the tokens' shares. Totals become sums over the events; `product`
    // receives the lists' part.
    template <typename S>
    ListTops exact_lists(const S* z, Side& p, Side& q, double* product) {
        const TokensView& student = plan_.student.lists;
        const Floats low = broadcast(nothing), zero = broadcast(0.0f);
        Floats a_top = low, b_top = low, sum;
        for (int64_t k = 0; k < student.slices; ++k) {
            const Floats top = exact_sums(student, k, z, p_.lowest, &sum);
            const Floats log_a = log(sum) + (top - broadcast(p.centre));
            store(h_ + lanes * k, log_a);
            a_top = max(select(counted(k), log_a, low), a_top);
            b_top = max(select(counted(k), gather(teacher_sum_, plan_.teacher_list + lanes * k), low), b_top);
            if (wanted_) {
                each_share(student, k, broadcast(1.0f) / sum, [&](int32_t token, float share) { e_[token] = share; });
            }
        }
        const ListTops tops{largest(a_top), largest(b_top)};
        DoubleSum a_total, b_total, products;
        each_list(tops, [&](int64_t, Floats a, Floats b, Floats d) {
            a_total.add(a);
            b_total.add(b);
            products.add(p_.reverse ? a * d : b * (zero - d));
        });
        const double a_unit = unit(tops.a), b_unit = unit(tops.b);
        p.total = paired(e_, plan_.student, size_, false) + a_unit * a_total.total();
        q.total = paired(f_, plan_.teacher, p_.teacher.width, logarithms_) + b_unit * b_total.total();
        *product += (p_.reverse ? a_unit : b_unit) * products.total();
        return tops;
    }

    double unit(float top) const { return ::exp(static_cast<double>(top) / p_.temperature); }

    // Calls body(k, a, b, tau (log a - log b)) with 16 lists of the student, relative to the tops; zeros for none.
    template <typename Body>
    void each_list(const ListTops& tops, Body body) const {
        const Exponential exp = Exponential::around(0.0f, nothing, p_.temperature);
        const Floats zero = broadcast(0.0f);
        for (int64_t k = 0; k < plan_.student.lists.slices; ++k) {
            const Mask valid = counted(k);
            const Floats log_a = load(h_ + lanes * k), log_b = gather(teacher_sum_, plan_.teacher_list + lanes * k);
            body(k, select(valid, exp(log_a - broadcast(tops.a)), zero),
                 select(valid, exp(log_b - broadcast(tops.b)), zero), select(valid, log_a - log_b, zero));
        }
    }

    // The sum of a side's exponentials, or of those of tau times logarithms, over its pairs.
    double paired(const float* values, const StartView& start, int64_t size, bool logarithms) const {
        const Exponential exp = Exponential::around(0.0f, nothing, p_.temperature);
        DoubleSum total;
        for (int64_t i = 0; i < size; i += lanes) {
            const Floats x = load(values + i);
            total.add(select(from_bits(start.paired_bits[i / lanes]), logarithms ? exp(x) : x, broadcast(0.0f)));
        }
        return total.total();
    }

    // h of the tempered lists.
    void find_slopes(const ListTops& tops, const Slope& slope, double p_total, double q_total) {
        const double factor = gradient_factor();
        const Floats student = broadcast(static_cast<float>(factor * unit(tops.a) / p_total));
        const Floats teacher = broadcast(static_cast<float>(factor * unit(tops.b) / q_total));
        const Floats high = broadcast(slope.mean_high), low = broadcast(slope.mean_low);
        each_list(tops, [&](int64_t k, Floats a, Floats b, Floats d) {
            store(h_ + lanes * k, p_.reverse ? a * student * ((d - high) - low) : a * student - b * teacher);
        });
    }

    // The term of a divergence from a mixture; x becomes P s, and h the lists' slopes.
    template <typename S>
    Slope add_mixed_term(const S* z, const Side& p, const Side& q, const ListTops& tops) {
        const MixedDivergence divergence(p_.divergence);
        const Exponential exp = Exponential::around(0.0f, nothing, p_.temperature);
        const Floats inverse = broadcast(static_cast<float>(1 / p_.temperature));
        const Floats shift = broadcast(static_cast<float>(::log(p.total) - ::log(q.total)));
        const Floats zero = broadcast(0.0f);
        DoubleSum terms, means;
        Floats per_a = broadcast(static_cast<float>(1 / p.total)), per_b = broadcast(static_cast<float>(1 / q.total));
        for (int64_t i = 0; i < size_; i += lanes) {
            const Mask is_pair = from_bits(plan_.student.paired_bits[i / lanes]);
            const Floats log_b = load(x_ + i), log_a = at_least(tail_load(z, i), p_.lowest) - broadcast(p.centre);
            const Floats share = load(e_ + i) * per_a;
            const auto part = divergence(fma(log_b - log_a, inverse, shift));
            const Floats pull = select(is_pair, share * divergence.slope(part), zero);
            const Floats term = fma(exp(log_b) * per_b, part.of_teacher, share * part.of_student);
            terms.add(select(is_pair, term, zero));
            means.add(pull);
            store(x_ + i, pull);
        }
        per_a = broadcast(static_cast<float>(unit(tops.a) / p.total));
        per_b = broadcast(static_cast<float>(unit(tops.b) / q.total));
        each_list(tops, [&](int64_t, Floats a, Floats b, Floats d) {
            const auto part = divergence(fnma(d, inverse, shift));
            terms.add(fma(b * per_b, part.of_teacher, a * per_a * part.of_student));
            means.add(a * per_a * divergence.slope(part));
        });
        loss_ += weight_ * terms.total();
        const double factor = gradient_factor(), mean = means.total();
        each_list(tops, [&](int64_t k, Floats a, Floats, Floats d) {
            const Floats s = divergence.slope(divergence(fnma(d, inverse, shift)));
            store(h_ + lanes * k,
                  a * per_a * broadcast(static_cast<float>(factor)) * (s - broadcast(static_cast<float>(mean))));
        });
        Slope slope;
        slope.student = static_cast<float>(-factor * mean / p.total);
        slope.teacher = static_cast<float>(-factor);
        return slope;
    }

    // h of each token outside the pairs, in the order of the row.
    void spread_lists(const Slope& slope) {
        const int64_t events = padded(plan_.events);
        if (p_.reverse && !tempered_) {
            const Floats student = broadcast(slope.student);
            const Floats high = broadcast(slope.mean_high), low = broadcast(slope.mean_low);
            for (int64_t e = 0; e < events; e += lanes) {
                const Floats h = student * ((load(h_ + e) - high) - low);
                store(h_ + e, select(counted(e / lanes), h, broadcast(0.0f)));
            }
        }
        store(h_ + events, broadcast(0.0f));
        for (int64_t i = 0; i < plan_.others; i += lanes) store(others_ + i, gather(h_, plan_.other_list + i));
    }

    // The largest logits of the lists of slice k, and the sums of the exponentials relative to them, which are put into
    // slice_. Lanes without a list have a sum of 1.
    template <typename T>
    Floats exact_sums(const TokensView& lists, int64_t k, const T* row, float lowest, Floats* sum) {
        const Floats low = broadcast(nothing), zero = broadcast(0.0f);
        Floats top = low;
        each_token(lists, k, row, [&](int64_t i, Floats x, int64_t n) {
            x = only(n, max(broadcast(lowest), x), low);
            store(slice_ + lanes * i, x);
            top = max(x, top);
        });
        const Exponential exp = Exponential::around(0.0f, nothing, 1.0);
        *sum = zero;
        for (int64_t i = lists.start[k]; i < lists.start[k + 1]; ++i) {
            float* values = slice_ + lanes * (i - lists.start[k]);
            const Floats e = only(lists.lanes[i], exp(load(values) - top), zero);
            store(values, e);
            *sum += e;
        }
        *sum = only(lists.lanes[lists.start[k]], *sum, broadcast(1.0f));
        return top;
    }

    // Calls body(token, x) with `factor` times slice_ for the tokens of the lists of slice k.
    template <typename Body>
    void each_share(const TokensView& lists, int64_t k, Floats factor, Body body) const {
        for (int64_t i = lists.start[k]; i < lists.start[k + 1]; ++i) {
            alignas(64) float lane[lanes];
            store(lane, load(slice_ + lanes * (i - lists.start[k])) * factor);
            for (int32_t l = 0; l < lists.lanes[i]; ++l) body(lists.tokens[lanes * i + l], lane[l]);
        }
    }

    template <typename T>
    Floats tail_load(const T* z, int64_t i) const {
        return load(z + i, size_ - i, broadcast(0.0f));
    }

    // A later row: a boundary before its token, if there is one, or boundaries inside it.
    template <typename S>
    void later_row(int64_t r, const S* z) {
        const float ends = inside(r);
        const LabelTerm label = label_of(r, z, nullptr);
        if (!wanted_) return;
        const Floats factor = broadcast(ends);
        const RemainingRow<S> row{z, without_, p_.lowest};
        write_row(Target{p_.grad.row(r), size_, p_.grad.width}, z, [&](int64_t i) {
            const Floats zi = tail_load(z, i);
            const Floats g = ends == 0.0f ? broadcast(0.0f) : remaining_(row.remaining(i, zi)) * factor;
            const Floats h = unless_raised(zi, p_.lowest, additions_.to(i, g));
            return label.present ? with_label(label, i, label.exp(zi), h) : h;
        });
    }

    // The boundaries that look at student row r: their losses, and their gradients into the additions. Returns the
    // factor of remaining_'s exponentials in the gradient, of the row without the tokens in without_.
    float inside(int64_t r) {
        float ends = 0.0f;
        for (int64_t n = p_.first_boundary[k_]; n < p_.first_boundary[k_ + 1]; ++n) {
            const InnerBoundary& boundary = p_.boundaries[n];
            const bool student_whole = boundary.whole_side == 0;
            if ((student_whole ? boundary.whole_row : boundary.part_row) != r) continue;
            const int64_t other_row = student_whole ? boundary.part_row : boundary.whole_row;
            const InnerSide student{p_.student.type, p_.student.row(r), inner_.z_top, inner_.z_sum};
            const InnerSide teacher{p_.teacher.type, p_.teacher.row(other_row), inner_.y_top, inner_.y_sum};
            if (student_whole) {
                inner_term(boundary, student, teacher);
            } else {
                ends = inner_term(boundary, teacher, student);
            }
        }
        return ends;
    }

    // One boundary, with the rows of both sides. Returns the slope of "ends" if the student starts a token there.
    float inner_term(const InnerBoundary& boundary, const InnerSide& of_whole, const InnerSide& of_part) {
        const PieceSide& whole = plan_.index.side[boundary.whole_side];
        const PieceSide& part = plan_.index.side[1 - boundary.whole_side];
        const StartView& by_event = boundary.whole_side == 0 ? plan_.teacher : plan_.student;  // of `part`
        // Events are ranges of tokens: those that end here first, then by the event of the next piece.
        int64_t size = boundary.last - boundary.first, count = 0, others = 0;
        for (int64_t i = 0; i < size; ++i) {
            const int32_t token = whole.order[boundary.first + i];
            const int64_t at = whole.ptr[token] + boundary.depth;
            const int32_t piece = at < whole.ptr[token + 1] ? whole.pieces[at] : -1;
            if (piece == part.size) {  // nobody can spell what comes; the last event of all
                size = i;
                break;
            }
            tokens_[i] = token;
            const int32_t event = piece < 0 ? -1 : part.event[piece];
            if (i == 0 || event != event_[count - 1]) {
                begin_[count] = static_cast<int32_t>(i);
                event_[count++] = event;
                if (event >= 0) others += by_event.ptr[event + 1] - by_event.ptr[event];
            }
        }
        begin_[count] = static_cast<int32_t>(size);
        const bool has_ends = count > 0 && event_[0] < 0;
        float ends_share = 1.0f;
        const ChunkRows& part_rows = boundary.whole_side == 0 ? p_.teacher_rows : p_.student_rows;
        const int32_t known = part.event[part_rows.next[boundary.part_row - boundary.depth]];
        // It has no token on one side; or where a merged event begins, one side ends for reasons of its own.
        const int64_t skipped = has_ends && (others == part.size || plan_.merged[known] != 0) ? 1 : 0;
        if (count == skipped) {
            if (p_.weighted) weight_ = 0.0;
            return 0.0f;
        }

        typed(of_whole.type, of_whole.row,
              [&](const auto* row) { sum_ranges(row, size, count, of_whole.top, of_whole.sum); });
        typed(of_part.type, of_part.row, [&](const auto* row) {
            for (int64_t e = has_ends; e < count; ++e) {
                sum_event(row, by_event, event_[e], of_part.top + e, of_part.sum + e);
            }
        });
        if (has_ends && skipped == 0) {
            memset(without_, 0, static_cast<size_t>(padded(part.size) / lanes) * sizeof(uint16_t));
            for (int64_t e = 1; e < count; ++e) {
                each_token_of(by_event, event_[e], [&](int32_t token) {
                    without_[token / lanes] |= static_cast<uint16_t>(1u << token % lanes);
                });
            }
            const Normaliser rest =
                typed(of_part.type, of_part.row, [&](const auto* row) { return sum_remaining(row, part.size); });
            of_part.top[0] = rest.centre;
            ends_share = temper(rest.total, of_part.top, of_part.sum);
            remaining_ = rest.exp;
        }
        if (skipped == 1) {  // an event of no mass on either side
            of_whole.top[0] = of_part.top[0] = nothing;
            of_whole.sum[0] = of_part.sum[0] = 1.0f;
        }
        const double before = weight_;
        const double realised = compare_events(inner_, count, p_.weighted ? realised_event(boundary, count) : -1);
        weight_ = p_.weighted ? before * realised : 1.0;
        if (!wanted_) return 0.0f;
        if (boundary.whole_side == 0) {
            for (int64_t e = skipped; e < count; ++e) {
                for (int32_t i = begin_[e]; i < begin_[e + 1]; ++i) {
                    additions_.add(tokens_[i], values_[i] * inner_.slope[e]);
                }
            }
            return 0.0f;
        }
        const Exponential exp = Exponential::around(0.0f, nothing, 1.0);
        typed(of_part.type, of_part.row, [&](const auto* row) {
            for (int64_t e = has_ends; e < count; ++e) {
                each_token_of(by_event, event_[e], [&](int32_t token) {
                    const float x = at_least(widened(row[token]), p_.lowest) - of_part.top[e];
                    additions_.add(token, first_lane(exp(broadcast(x))) * inner_.slope[e]);
                });
            }
        });
        return has_ends && skipped == 0 ? inner_.slope[0] * ends_share : 0.0f;
    }

    // The exponentials' sum of a row without the tokens in without_.
    template <typename P>
    Normaliser sum_remaining(const P* row, int64_t size) const {
        return exponentials(RemainingRow<P>{row, without_, p_.lowest}, size, nothing, 1.0, [](int64_t, Floats) {});
    }

    // Calls body(token) with a side's tokens of an event.
    template <typename Body>
    static void each_token_of(const StartView& side, int32_t event, Body body) {
        for (int32_t i = side.ptr[event]; i < side.ptr[event + 1]; ++i) body(side.tokens[i]);
    }

    // The place of the event of the teacher's realised token, -1 if it has none.
    int64_t realised_event(const InnerBoundary& boundary, int64_t count) const {
        const bool is_whole = boundary.whole_side == 1;
        const int64_t token = p_.teacher_rows.next[is_whole ? boundary.whole_row : boundary.part_row];
        const PieceSide &student = plan_.index.side[0], &teacher = plan_.index.side[1];
        int32_t event = teacher.event[token];
        if (is_whole) {
            const int64_t at = teacher.ptr[token] + boundary.depth;
            const int32_t piece = at < teacher.ptr[token + 1] ? teacher.pieces[at] : student.size;
            event = piece < student.size ? student.event[piece] : INT32_MAX;
        }
        int64_t e = 0;
        for (int64_t end = count; e < end;) {  // the first that is not below
            const int64_t middle = (e + end) / 2;
            if (event_[middle] < event) {
                e = middle + 1;
            } else {
                end = middle;
            }
        }
        if (e < count && event_[e] == event) return e;
        return is_whole || event_[0] >= 0 ? -1 : 0;
    }

    // An event's sum relative to its top; with a temperature all is in the top. Returns what makes the exponentials
    // those relative to the new top.
    float temper(double total, float* top, float* sum) const {
        *sum = static_cast<float>(total);
        if (!tempered_) return 1.0f;
        *top = static_cast<float>(static_cast<double>(*top) + ::log(total));
        *sum = 1.0f;
        return static_cast<float>(1.0 / total);
    }

    // Tops and sums of `count` ranges of the first `size` tokens; values_ receives the exponentials relative to the
    // tops.
    template <typename W>
    void sum_ranges(const W* row, int64_t size, int64_t count, float* top, float* sum) {
        for (int64_t i = size; i < padded(size); ++i) tokens_[i] = tokens_[0];
        for (int64_t i = 0; i < size; i += lanes) {
            store(values_ + i, max(broadcast(p_.lowest), gather(row, tokens_ + i)));
        }
        for (int64_t e = 0; e < count; ++e) {
            float largest_value = values_[begin_[e]];
            for (int32_t i = begin_[e]; i < begin_[e + 1]; ++i) {
                if (values_[i] > largest_value) largest_value = values_[i];
            }
            for (int32_t i = begin_[e]; i < begin_[e + 1]; ++i) values_[i] -= largest_value;
            top[e] = largest_value;
        }
        const Exponential exp = Exponential::around(0.0f, nothing, 1.0);
        for (int64_t i = 0; i < size; i += lanes) store(values_ + i, exp(load(values_ + i)));
        for (int64_t e = 0; e < count; ++e) {
            double total = 0;
            for (int32_t i = begin_[e]; i < begin_[e + 1]; ++i) total += static_cast<double>(values_[i]);
            const float share = temper(total, top + e, sum + e);
            for (int32_t i = begin_[e]; tempered_ && i < begin_[e + 1]; ++i) values_[i] *= share;
        }
    }

    // Top and sum of an event of one side.
    template <typename P>
    void sum_event(const P* row, const StartView& side, int32_t event, float* top, float* sum) const {
        const int32_t *tokens = side.tokens + side.ptr[event], *end = side.tokens + side.ptr[event + 1];
        const Floats low = broadcast(nothing);
        const auto load_from = [&](const int32_t* at) {
            return only(smaller(lanes, end - at), max(broadcast(p_.lowest), gather(row, at)), low);
        };
        Floats tops = low;
        for (const int32_t* at = tokens; at < end; at += lanes) tops = max(load_from(at), tops);
        *top = largest(tops);
        const Exponential exp = Exponential::around(*top, nothing, 1.0);
        DoubleSum total;
        for (const int32_t* at = tokens; at < end; at += lanes) total.add(exp(load_from(at)));
        temper(total.total(), top, sum);
    }

    // Adds the term of `count` events to the loss, and finds their slopes. Returns the teacher's probability of event
    // `realised`, 0 for -1.
    double compare_events(const Events& events, int64_t count, int64_t realised) {
        Floats z_top = broadcast(nothing), y_top = z_top;
        for (int64_t e = 0; e < count; e += lanes) {
            const Mask mask = first(count - e);
            z_top = max(select(mask, load(events.z_top + e), z_top), z_top);
            y_top = max(select(mask, load(events.y_top + e), y_top), y_top);
        }
        Side p = side_around(largest(z_top)), q = side_around(largest(y_top));
        const Floats zero = broadcast(0.0f);
        DoubleSum p_total, q_total, products;
        for (int64_t e = 0; e < count; e += lanes) {
            const Mask mask = first(count - e);
            const Floats a = select(mask, p.exp(load(events.z_top + e)) * load(events.z_sum + e), zero);
            const Floats b = select(mask, q.exp(load(events.y_top + e)) * load(events.y_sum + e), zero);
            const Floats d = select(mask, difference(events, e, p, q), zero);
            p_total.add(a);
            q_total.add(b);
            products.add(p_.reverse ? a * d : b * (zero - d));
        }
        if (mixed_) {
            add_mixed_term(events, count, p, q, p_total.total(), q_total.total());
        } else {
            find_slopes(events, count, p, q, add_term(p_total.total(), q_total.total(), products.total()));
        }
        if (realised < 0) return 0.0;
        const double relative = static_cast<double>(events.y_top[realised]) - static_cast<double>(q.centre);
        return ::exp(relative / p_.temperature) * static_cast<double>(events.y_sum[realised]) / q_total.total();
    }

    // The slopes of events.
    void find_slopes(const Events& events, int64_t count, const Side& p, const Side& q, const Slope& slope) {
        const Floats student = broadcast(slope.student), teacher = broadcast(slope.teacher);
        for (int64_t e = 0; wanted_ && e < count; e += lanes) {
            const Floats a = p.exp(load(events.z_top + e)) * student;
            Floats g;
            if (p_.reverse) {
                g = a * ((difference(events, e, p, q) - broadcast(slope.mean_high)) - broadcast(slope.mean_low));
            } else {
                const Floats share = load(events.y_sum + e) / load(events.z_sum + e);
                g = a - q.exp(load(events.y_top + e)) * teacher * share;
            }
            store(events.slope + e, g);
        }
    }

    // The term of a divergence from a mixture, and the slopes of its events.
    void add_mixed_term(const Events& events, int64_t count, const Side& p, const Side& q, double p_total,
                        double q_total) {
        const MixedDivergence divergence(p_.divergence);
        const Floats inverse = broadcast(static_cast<float>(1 / p_.temperature));
        const Floats shift = broadcast(static_cast<float>(::log(p_total) - ::log(q_total)));
        const Floats per_a = broadcast(static_cast<float>(1 / p_total));
        const Floats per_b = broadcast(static_cast<float>(1 / q_total));
        DoubleSum terms, means;
        for (int64_t e = 0; e < count; e += lanes) {
            const Mask mask = first(count - e);
            const auto part = divergence(fnma(difference(events, e, p, q), inverse, shift));
            const Floats a = p.exp(load(events.z_top + e)) * load(events.z_sum + e) * per_a;
            const Floats b = q.exp(load(events.y_top + e)) * load(events.y_sum + e) * per_b;
            terms.add(select(mask, fma(b, part.of_teacher, a * part.of_student), broadcast(0.0f)));
            means.add(select(mask, a * divergence.slope(part), broadcast(0.0f)));
        }
        loss_ += weight_ * terms.total();
        const Floats student = broadcast(static_cast<float>(gradient_factor() / p_total));
        const Floats mean = broadcast(static_cast<float>(means.total()));
        for (int64_t e = 0; wanted_ && e < count; e += lanes) {
            const Floats s = divergence.slope(divergence(fnma(difference(events, e, p, q), inverse, shift)));
            store(events.slope + e, p.exp(load(events.z_top + e)) * student * (s - mean));
        }
    }

    Side side_around(float centre) const { return {Exponential::around(centre, nothing, p_.temperature), centre, 0.0}; }

    // temperature (log a - log b), relative to the centres.
    Floats difference(const Events& events, int64_t e, const Side& p, const Side& q) const {
        const Floats logs = log(load(events.z_sum + e)) - log(load(events.y_sum + e));
        const Floats tops =
            (load(events.z_top + e) - broadcast(p.centre)) - (load(events.y_top + e) - broadcast(q.centre));
        return fma(logs, broadcast(static_cast<float>(p_.temperature)), tops);
    }

    // Adds a boundary's term to the loss: from A, B, and the sum of b tau D or the reverse's a tau D, all of them
    // relative to the centres, whose differences cancel.
    Slope add_term(double p_total, double q_total, double product) {
        const double mean = product / (p_.reverse ? p_total : q_total);
        const double difference = ::log(p_total) - ::log(q_total);
        loss_ += weight_ * (mean / p_.temperature + (p_.reverse ? -difference : difference));
        return slope_of(p_total, q_total, mean);
    }

    Slope slope_of(double p_total, double q_total, double mean) const {
        const double factor = gradient_factor();
        const auto high = static_cast<float>(mean);
        return {static_cast<float>(factor / p_total), static_cast<float>(factor / q_total), high,
                static_cast<float>(mean - static_cast<double>(high))};
    }

    double gradient_factor() const { return weight_ * (p_.reverse ? scale_ : scale_ * p_.temperature); }

    template <typename S>
    LabelTerm label_of(int64_t r, const S* z, const Normaliser* known) const {
        return label_term_if_any(p_.labels, r, z, size_, p_.lowest, known);
    }

    static Floats with_label(const LabelTerm& label, int64_t i, Floats e, Floats g) {
        return label.without_label(i, fma(e, broadcast(label.weight), g));
    }

    const PrefixChunks& p_;
    const PrefixPlanView& plan_;
    int64_t k_, size_;
    bool wanted_, tempered_, mixed_;
    bool logarithms_;     // f is tau log b
    bool exact_lists_;    // every list is read relative to its own largest logit, and e is a token's share of it
    float *e_, *x_;       // by student id; x only of blocks whose partners do not follow, but of all if logarithms_
    float* f_;            // by teacher id
    float* slice_;        // of the lists of one slice
    float* teacher_sum_;  // by the teacher's list: the sums of f, or the reverse's logarithms times temperature
    float *h_, *others_;  // by the student's list; by the student's tokens outside the pairs, in order
    Events inner_;
    int32_t *event_, *begin_;  // of the token that goes on: its next event, and the first token of the range
    float* values_;
    int32_t* tokens_;
    int32_t* left_out_;  // events that the start leaves out
    int64_t left_count_ = 0;
    uint16_t* left_lists_;  // a bit for each of the student's lists; only where there are such events
    uint16_t* without_;
    Additions additions_;
    Exponential remaining_ = any_exponential();
    double loss_ = 0, scale_ = 1;
    double weight_ = 1;  // of the next boundary
};

}  // namespace

void prefix_chunk(const PrefixChunks& params, int64_t k, char* workspace) { Chunk(params, k, workspace).run(); }

}  // namespace xtoken::cpu::XTOKEN_LEVEL
