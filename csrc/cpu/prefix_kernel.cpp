// Prefix KL of one chunk. The formula is that of xtoken.reference.prefix.
//
// At a boundary let a_e, b_e be the sums of exp(logit / tau) of the student's and the teacher's tokens in the event e,
// A and B their sums over the events that both sides have, P_e = a_e / A and Q_e = b_e / B. Then
//   KL(Q || P) = sum Q_e D_e + log A - log B,  D_e = log b_e - log a_e,   d / d log a_e = P_e - Q_e
//   KL(P || Q) = sum P_e D_e + log B - log A,  D_e = log a_e - log b_e,   d / d log a_e = P_e (D_e - sum P D)
// and d log a_e / d logit_s = (share of s in a_e) / tau for its tokens s.
//
// An event of several tokens is kept as the largest logit ("top") and the sum of the exponentials relative to it, so
// that log a_e is exact however small a_e is. At the start of a chunk most events are pairs of one token on each side:
// they are read in the order of the student's row, and their exponentials are kept for the gradient; lists of tokens
// are gathered. The sums of both kinds have centres of their own and meet as logarithms.
#include "cpu/prefix.h"

#include "cpu/rows.h"

namespace xtoken::cpu::XTOKEN_LEVEL {
namespace {

constexpr float nothing = -3e38f;  // below every logit

template <typename T>
T* take(char*& at, int64_t count) {
    T* result = reinterpret_cast<T*>(at);
    at += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return result;
}

// Sums over some of the events of a boundary.
struct Part {
    Exponential p, q;          // of the student and the teacher
    float z_centre, y_centre;  // logits that their exponentials are relative to
    double p_total, q_total;   // a and b in those units
    double mean;               // of temperature D with logits relative to the centres, under the first distribution
    bool is_empty;

    double log_p() const { return ::log(p_total) + p.log_unit(); }
    double log_q() const { return ::log(q_total) + q.log_unit(); }
};

// Functions, not constants: nothing of a level may run before it is chosen.
Exponential any_exponential() { return Exponential::around(0.0f, 0.0f, 1.0); }
Part no_part() { return {any_exponential(), any_exponential(), 0.0f, 0.0f, 0.0, 0.0, 0.0, true}; }

// What makes a gradient of a part: student * e - teacher * f, or the reverse student * e (tau D - mean).
struct Slope {
    float student = 0.0f, teacher = 0.0f, mean_high = 0.0f, mean_low = 0.0f;
};

// Events with tops and sums of both sides, in arrays padded to whole vectors.
struct Events {
    float *z_top, *z_sum, *y_top, *y_sum;
    float* slope;  // out: d loss / d log a, divided by z_sum
};

// A row without the tokens whose bit is set.
template <typename T>
struct RemainingRow {
    const T* p;
    const uint16_t* without;  // [ceil(width / 16)]
    float lowest;
    Floats at(int64_t i) const {
        prefetch(p + i + ahead);
        return remaining(i, load(p + i));
    }
    Floats tail(int64_t i, int64_t n) const { return remaining(i, load(p + i, n, broadcast(0.0f))); }
    Floats remaining(int64_t i, Floats x) const {
        x = max(broadcast(lowest), x);
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
    Floats to(int64_t i, Floats x) const { return any_ && touched_[i / lanes] != 0 ? x + load(values_ + i) : x; }

  private:
    float* values_;
    uint16_t* touched_;
    int64_t blocks_;
    bool any_ = false;
};

class Chunk {
  public:
    Chunk(const PrefixParams& p, int64_t k, char* at)
        : p_(p),
          plan_(p.plan),
          k_(k),
          size_(p.student.width),
          wanted_(p.grad.data != nullptr),
          e_(take<float>(at, padded(size_))),
          pair_(take<float>(at, padded(size_))),
          shares_(take<float>(at, lanes * (plan_.student.start[plan_.student.slices] + 1))),
          gathered_(take<float>(at, plan_.teacher.slices == 0 ? 0 : lanes * plan_.teacher.start[1])),
          list_top_(take<float>(at, padded(plan_.events))),
          list_sum_(take<float>(at, padded(plan_.events))),
          start_(take_events(at, plan_.events)),
          others_(take<float>(at, padded(plan_.others) + lanes)),
          inner_(take_events(at, p.most + 1)),
          piece_(take<int32_t>(at, p.most + 1)),
          begin_(take<int32_t>(at, p.most + 2)),
          values_(take<float>(at, padded(p.most))),
          tokens_(take<int32_t>(at, padded(p.most))),
          without_(take<uint16_t>(
              at, padded(p.student.width > p.teacher.width ? p.student.width : p.teacher.width) / lanes)),
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
                    typed(p_.teacher.type, p_.teacher.row(p_.teacher_rows.start[k_]),
                          [&](const auto* y) { first_row(r, z, y); });
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

    // The teacher's logits of the partners of students i ... i + 15.
    template <typename T>
    Floats partners(const T* y, int64_t i) const {
        const int32_t run = plan_.partner_run[i / lanes];
        return run < 0 ? gather(y, plan_.partner + i) : load(y + run);
    }

    Floats relative(Floats x, float centre) const { return max(broadcast(p_.lowest), x) - broadcast(centre); }

    // The first row: the events at the start of the chunk, and boundaries inside the first token.
    template <typename S, typename T>
    void first_row(int64_t r, const S* z, const T* y) {
        Normaliser all{any_exponential(), 0.0f, 0.0, p_.lowest};
        const Part pairs = compare_pairs(z, y, &all);
        read_lists(plan_.student, z, shares_, true, start_.z_top, start_.z_sum);
        read_lists(plan_.teacher, y, gathered_, false, list_top_, list_sum_);
        for (int64_t e = 0; e < plan_.events; e += lanes) {
            store(start_.y_top + e, gather(list_top_, plan_.teacher_list + e));
            store(start_.y_sum + e, gather(list_sum_, plan_.teacher_list + e));
        }
        const Part lists = compare_events(start_, plan_.events);
        Slope pair_slope, list_slope;
        combine(pairs, lists, &pair_slope, &list_slope);
        inside(r, z);
        const LabelTerm label = label_of(r, z, all.total > 0 ? &all : nullptr);
        if (!wanted_) return;
        event_slopes(start_, plan_.events, lists, list_slope);
        spread_lists();
        const Floats zero = broadcast(0.0f), lowest = broadcast(p_.lowest);
        const Floats student = broadcast(pair_slope.student), teacher = broadcast(pair_slope.teacher);
        const Floats high = broadcast(pair_slope.mean_high), low = broadcast(pair_slope.mean_low);
        const bool same = label.present && all.total > 0;
        const float* other = others_;
        write_row(Target{p_.grad.row(r), size_, p_.grad.width}, z, [&](int64_t i) {
            const Floats zi = load(z + i, size_ - i, zero), e = load(e_ + i), x = load(pair_ + i);
            Floats g = p_.reverse ? e * student * ((x - high) - low) : fma(e, student, zero - x * teacher);
            const uint32_t paired = plan_.paired_bits[i / lanes], rest = ~paired & 0xFFFFu;
            if (rest != 0) {
                g = select(from_bits(paired), g, expand(other, from_bits(rest)));
                other += __builtin_popcount(rest);
            }
            // the derivative of max(z, lowest)
            g = select(greater(lowest, zi), zero, additions_.to(i, g));
            return label.present ? with_label(label, i, same ? e : label.exp(zi), g) : g;
        });
    }

    // The pairs; `all` receives the normaliser of the whole student row, if the temperature is 1 and the pairs' centre
    // does for it.
    template <typename S, typename T>
    Part compare_pairs(const S* z, const T* y, Normaliser* all) const {
        const double tau = p_.temperature;
        const int64_t whole = size_ / lanes * lanes;
        const WholeRow<S> student{z};
        const Floats zero = broadcast(0.0f);
        Floats z_top = broadcast(nothing), y_top = z_top;
        bool found = false;
        for (int64_t i = 0; i < size_ && (i < 4096 || !found); i += lanes) {
            const uint32_t paired = plan_.paired_bits[i / lanes];
            if (paired == 0) continue;
            found = true;
            const Mask mask = from_bits(paired);
            z_top = max(select(mask, max(broadcast(p_.lowest), load(z + i, size_ - i, zero)), z_top), z_top);
            y_top = max(select(mask, max(broadcast(p_.lowest), partners(y, i)), y_top), y_top);
        }
        if (!found) return no_part();
        float z_centre = largest(z_top), y_centre = largest(y_top);
        for (;;) {
            const Exponential p = Exponential::around(z_centre, p_.lowest, tau);
            const Exponential q = Exponential::around(y_centre, p_.lowest, tau);
            DoubleSum p_total, q_total, products, every;
            Floats p_part = zero, q_part = zero, product_part = zero, every_part = zero;
            z_top = broadcast(z_centre);
            y_top = broadcast(y_centre);
            Floats every_top = z_top;
            const auto step = [&](int64_t i, Floats zi, Mask valid) {
                const Mask paired = from_bits(plan_.paired_bits[i / lanes]);
                const Floats yi = partners(y, i);
                const Floats e = select(valid, p(zi), zero);
                every_part += e;
                every_top = max(select(valid, zi, every_top), every_top);
                z_top = max(select(paired, zi, z_top), z_top);
                y_top = max(select(paired, yi, y_top), y_top);
                const Floats pe = select(paired, e, zero), qf = select(paired, q(yi), zero);
                const Floats difference = relative(zi, z_centre) - relative(yi, y_centre);
                p_part += pe;
                q_part += qf;
                product_part = p_.reverse ? fma(pe, difference, product_part) : fnma(qf, difference, product_part);
                store(e_ + i, e);
                store(pair_ + i, p_.reverse ? difference : qf);
            };
            const auto add = [&] {
                p_total.add(p_part);
                q_total.add(q_part);
                products.add(product_part);
                every.add(every_part);
                p_part = q_part = product_part = every_part = zero;
            };
            for (int64_t begin = 0; begin < whole; begin += flush) {
                for (int64_t i = begin; i < smaller(begin + flush, whole); i += lanes) {
                    prefetch(y + i +
                             ahead);  // ids of partners are near each other; a row of either side ends somewhere
                    step(i, student.at(i), from_bits(0xFFFFu));
                }
                add();
            }
            if (whole < size_) {
                step(whole, load(z + whole, size_ - whole, zero), first(size_ - whole));
                add();
            }
            // As in `exponentials`: once more if the largest numbers were not among the first.
            const float z_found = largest(z_top), y_found = largest(y_top), every_found = largest(every_top);
            const bool z_grew = z_found > z_centre + 30 * tau && z_found < 3e38f;
            const bool y_grew = y_found > y_centre + 30 * tau && y_found < 3e38f;
            if (z_grew) z_centre = z_found;
            if (y_grew) y_centre = y_found;
            if (z_grew || y_grew) continue;
            if (tau == 1.0 && every_found <= z_centre + 30) *all = {p, z_centre, every.total(), p_.lowest};
            const double over = p_.reverse ? p_total.total() : q_total.total();
            return {p, q, z_centre, y_centre, p_total.total(), q_total.total(), products.total() / over, false};
        }
    }

    // The tops and sums of each list of tokens of a row. `values` receives the exponentials relative to the tops, all
    // with `keep`, else only those of the last slice.
    template <typename T>
    void read_lists(const ListsView& lists, const T* row, float* values, bool keep, float* top_out,
                    float* sum_out) const {
        const Exponential exp = Exponential::around(0.0f, nothing, p_.temperature);
        const Floats lowest = broadcast(p_.lowest), zero = broadcast(0.0f);
        for (int64_t k = 0; k < lists.slices; ++k) {
            const int64_t begin = lists.start[k], end = lists.start[k + 1];
            float* slice = values + (keep ? lanes * begin : 0);
            Floats top = broadcast(nothing), sum = zero;
            for (int64_t i = begin; i < end; ++i) {
                const Floats x = max(lowest, gather(row, lists.tokens + lanes * i));
                store(slice + lanes * (i - begin), x);
                top = max(select(valid(lists, i), x, top), top);
            }
            for (int64_t i = begin; i < end; ++i) {
                float* value = slice + lanes * (i - begin);
                const Floats e = select(valid(lists, i), exp(load(value) - top), zero);
                store(value, e);
                sum += e;
            }
            store(top_out + lanes * k, top);
            store(sum_out + lanes * k, sum);
        }
    }
    static Mask valid(const ListsView& lists, int64_t i) { return first(lists.lanes[i]); }

    // Each student token outside the pairs gets its share of the event's slope, in the order of the row.
    void spread_lists() {
        const ListsView& lists = plan_.student;
        for (int64_t k = 0; k < lists.slices; ++k) {
            const Floats slope = load(start_.slope + lanes * k);
            for (int64_t i = lists.start[k]; i < lists.start[k + 1]; ++i) {
                const Floats share = load(shares_ + lanes * i);
                store(shares_ + lanes * i, select(valid(lists, i), share * slope, broadcast(0.0f)));
            }
        }
        store(shares_ + lanes * lists.start[lists.slices], broadcast(0.0f));
        for (int64_t i = 0; i < plan_.others; i += lanes) store(others_ + i, gather(shares_, plan_.other_place + i));
    }

    // A later row: a boundary before its token, if there is one, or boundaries inside it.
    template <typename S>
    void later_row(int64_t r, const S* z) {
        const float ends = inside(r, z);
        const LabelTerm label = label_of(r, z, nullptr);
        if (!wanted_) return;
        const Floats zero = broadcast(0.0f), lowest = broadcast(p_.lowest), factor = broadcast(ends);
        const RemainingRow<S> row{z, without_, p_.lowest};
        write_row(Target{p_.grad.row(r), size_, p_.grad.width}, z, [&](int64_t i) {
            const Floats zi = load(z + i, size_ - i, zero);
            Floats g = zero;
            if (ends != 0.0f) g = remaining_(row.remaining(i, zi)) * factor;
            g = select(greater(lowest, zi), zero, additions_.to(i, g));
            return label.present ? with_label(label, i, label.exp(zi), g) : g;
        });
    }

    // The boundaries that look at student row r: their losses, and their gradients into the additions. Returns the
    // factor of remaining_'s exponentials in the gradient, of the row without the tokens in without_.
    template <typename S>
    float inside(int64_t r, const S* z) {
        float ends = 0.0f;
        for (int64_t n = p_.first_boundary[k_]; n < p_.first_boundary[k_ + 1]; ++n) {
            const InnerBoundary& boundary = p_.boundaries[n];
            const bool student_whole = boundary.whole_side == 0;
            if ((student_whole ? boundary.whole_row : boundary.part_row) != r) continue;
            const int64_t other_row = student_whole ? boundary.part_row : boundary.whole_row;
            typed(p_.teacher.type, p_.teacher.row(other_row), [&](const auto* y) {
                if (student_whole) {
                    inner_term(boundary, z, y, inner_.z_top, inner_.z_sum, inner_.y_top, inner_.y_sum);
                } else {
                    ends = inner_term(boundary, y, z, inner_.y_top, inner_.y_sum, inner_.z_top, inner_.z_sum);
                }
            });
        }
        return ends;
    }

    // One boundary, with the rows of both sides. Returns the slope of "ends" if the student starts a token there.
    template <typename W, typename P>
    float inner_term(const InnerBoundary& boundary, const W* whole_row, const P* part_row, float* whole_top,
                     float* whole_sum, float* part_top, float* part_sum) {
        const PieceSide& whole = p_.index.side[boundary.whole_side];
        const PieceSide& part = p_.index.side[1 - boundary.whole_side];
        // Events are ranges of tokens: those that end here first, then by their next piece.
        int64_t size = boundary.last - boundary.first, count = 0;
        for (int64_t i = 0; i < size; ++i) {
            const int32_t token = whole.order[boundary.first + i];
            const int64_t at = whole.ptr[token] + boundary.depth;
            const int32_t piece = at < whole.ptr[token + 1] ? whole.pieces[at] : -1;
            if (piece == part.size) {  // nobody can spell what comes; the last event of all
                size = i;
                break;
            }
            tokens_[i] = token;
            if (i == 0 || piece != piece_[count - 1]) {
                begin_[count] = static_cast<int32_t>(i);
                piece_[count++] = piece;
            }
        }
        begin_[count] = static_cast<int32_t>(size);
        const bool has_ends = count > 0 && piece_[0] < 0;
        const int64_t skipped = has_ends && count - 1 == part.size ? 1 : 0;  // no token is left to end with
        if (count == skipped) return 0.0f;

        sum_ranges(whole_row, size, count, whole_top, whole_sum);
        for (int64_t e = has_ends; e < count; ++e) {
            const float x = widened(part_row[piece_[e]]);
            part_top[e] = p_.lowest > x ? p_.lowest : x;
            part_sum[e] = 1.0f;
        }
        if (has_ends && skipped == 0) {
            memset(without_, 0, static_cast<size_t>(padded(part.size) / lanes) * sizeof(uint16_t));
            for (int64_t e = 1; e < count; ++e) {
                without_[piece_[e] / lanes] |= static_cast<uint16_t>(1u << piece_[e] % lanes);
            }
            const Normaliser rest = exponentials(RemainingRow<P>{part_row, without_, p_.lowest}, part.size, nothing,
                                                 p_.temperature, [](int64_t, Floats) {});
            part_top[0] = rest.centre;
            part_sum[0] = static_cast<float>(rest.total);
            remaining_ = rest.exp;
        }
        if (skipped == 1) {  // an event of no mass on either side
            whole_top[0] = part_top[0] = nothing;
            whole_sum[0] = part_sum[0] = 1.0f;
        }
        const Part all = compare_events(inner_, count);
        Slope slope;
        combine(no_part(), all, nullptr, &slope);
        if (!wanted_) return 0.0f;
        event_slopes(inner_, count, all, slope);
        if (boundary.whole_side == 0) {
            for (int64_t e = skipped; e < count; ++e) {
                for (int32_t i = begin_[e]; i < begin_[e + 1]; ++i) {
                    additions_.add(tokens_[i], values_[i] * inner_.slope[e]);
                }
            }
            return 0.0f;
        }
        for (int64_t e = has_ends; e < count; ++e) additions_.add(piece_[e], inner_.slope[e]);
        return has_ends && skipped == 0 ? inner_.slope[0] : 0.0f;
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
        const Exponential exp = Exponential::around(0.0f, nothing, p_.temperature);
        for (int64_t i = 0; i < size; i += lanes) store(values_ + i, exp(load(values_ + i)));
        for (int64_t e = 0; e < count; ++e) {
            double total = 0;
            for (int32_t i = begin_[e]; i < begin_[e + 1]; ++i) total += static_cast<double>(values_[i]);
            sum[e] = static_cast<float>(total);
        }
    }

    // The part of `count` events.
    Part compare_events(const Events& events, int64_t count) const {
        if (count == 0) return no_part();
        Floats z_top = broadcast(nothing), y_top = z_top;
        for (int64_t e = 0; e < count; e += lanes) {
            const Mask mask = first(count - e);
            z_top = max(select(mask, load(events.z_top + e), z_top), z_top);
            y_top = max(select(mask, load(events.y_top + e), y_top), y_top);
        }
        const float z_centre = largest(z_top), y_centre = largest(y_top);
        const Exponential p = Exponential::around(z_centre, nothing, p_.temperature);
        const Exponential q = Exponential::around(y_centre, nothing, p_.temperature);
        const Floats zero = broadcast(0.0f);
        DoubleSum p_total, q_total, products;
        for (int64_t e = 0; e < count; e += lanes) {
            const Mask mask = first(count - e);
            const Floats a = select(mask, p(load(events.z_top + e)) * load(events.z_sum + e), zero);
            const Floats b = select(mask, q(load(events.y_top + e)) * load(events.y_sum + e), zero);
            const Floats d = select(mask, difference(events, e, z_centre, y_centre), zero);
            p_total.add(a);
            q_total.add(b);
            products.add(p_.reverse ? a * d : b * (zero - d));
        }
        const double over = p_.reverse ? p_total.total() : q_total.total();
        return {p, q, z_centre, y_centre, p_total.total(), q_total.total(), products.total() / over, false};
    }

    // temperature (log a - log b), relative to the centres.
    Floats difference(const Events& events, int64_t e, float z_centre, float y_centre) const {
        const Floats logs = log(load(events.z_sum + e)) - log(load(events.y_sum + e));
        const Floats tops =
            (load(events.z_top + e) - broadcast(z_centre)) - (load(events.y_top + e) - broadcast(y_centre));
        return fma(logs, broadcast(static_cast<float>(p_.temperature)), tops);
    }

    void event_slopes(const Events& events, int64_t count, const Part& part, const Slope& slope) const {
        const Floats student = broadcast(slope.student), teacher = broadcast(slope.teacher);
        for (int64_t e = 0; e < count; e += lanes) {
            const Floats p = part.p(load(events.z_top + e)) * student;
            Floats g;
            if (p_.reverse) {
                const Floats d = difference(events, e, part.z_centre, part.y_centre);
                g = p * ((d - broadcast(slope.mean_high)) - broadcast(slope.mean_low));
            } else {
                const Floats share = load(events.y_sum + e) / load(events.z_sum + e);
                g = p - part.q(load(events.y_top + e)) * teacher * share;
            }
            store(events.slope + e, g);
        }
    }

    // Adds the term of a boundary whose events are in two parts to the loss, and finds the slopes of both.
    void combine(const Part& one, const Part& two, Slope* one_slope, Slope* two_slope) {
        if (one.is_empty && two.is_empty) return;
        const double log_p = together(one, two, &Part::log_p), log_q = together(one, two, &Part::log_q);
        const double sign = p_.reverse ? 1 : -1, log_over = p_.reverse ? log_p : log_q;
        // D = centred D + offset
        const auto offset = [&](const Part& part) { return sign * (part.p.log_unit() - part.q.log_unit()); };
        double mean = 0;
        for (const Part* part : {&one, &two}) {
            if (part->is_empty) continue;
            const double share = ::exp((p_.reverse ? part->log_p() : part->log_q()) - log_over);
            mean += share * (part->mean / p_.temperature + offset(*part));
        }
        loss_ += mean - sign * (log_p - log_q);
        const double factor = p_.reverse ? scale_ : scale_ * p_.temperature;
        const auto slope = [&](const Part& part, Slope* out) {
            if (part.is_empty) return;
            const double centred_mean = p_.temperature * (mean - offset(part));
            out->student = static_cast<float>(factor * ::exp(part.p.log_unit() - log_p));
            out->teacher = static_cast<float>(factor * ::exp(part.q.log_unit() - log_q));
            out->mean_high = static_cast<float>(centred_mean);
            out->mean_low = static_cast<float>(centred_mean - static_cast<double>(out->mean_high));
        };
        slope(one, one_slope);
        slope(two, two_slope);
    }

    // The logarithm of the sum of both parts' masses.
    static double together(const Part& one, const Part& two, double (Part::*log_mass)() const) {
        if (one.is_empty) return (two.*log_mass)();
        if (two.is_empty) return (one.*log_mass)();
        const double a = (one.*log_mass)(), b = (two.*log_mass)();
        return a > b ? a + ::log1p(::exp(b - a)) : b + ::log1p(::exp(a - b));
    }

    // The row's label; `known` is the normaliser of all tokens at temperature 1, if there is one.
    template <typename S>
    LabelTerm label_of(int64_t r, const S* z, const Normaliser* known) {
        if (p_.labels.of(r) < 0) {
            if (p_.labels.ids != nullptr) p_.labels.losses[r] = 0;
            return {};
        }
        if (known != nullptr) return label_term(p_.labels, r, z, *known);
        return label_term(p_.labels, r, z, exponentials(WholeRow<S>{z}, size_, p_.lowest, 1.0, [](int64_t, Floats) {}));
    }

    static Floats with_label(const LabelTerm& label, int64_t i, Floats e, Floats g) {
        return label.without_label(i, fma(e, broadcast(label.weight), g));
    }

    const PrefixParams& p_;
    const PrefixPlanView& plan_;
    int64_t k_, size_;
    bool wanted_;
    float *e_, *pair_;  // by student id: the exponentials; the partners' ones (for the reverse: the differences)
    float *shares_, *gathered_, *list_top_, *list_sum_;
    Events start_;
    float* others_;
    Events inner_;
    int32_t *piece_, *begin_;
    float* values_;
    int32_t* tokens_;
    uint16_t* without_;
    Additions additions_;
    Exponential remaining_ = any_exponential();
    double loss_ = 0, scale_ = 1;
};

}  // namespace

void prefix_chunk(const PrefixParams& params, int64_t k, char* workspace) { Chunk(params, k, workspace).run(); }

}  // namespace xtoken::cpu::XTOKEN_LEVEL
