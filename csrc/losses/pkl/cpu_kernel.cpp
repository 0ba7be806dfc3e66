// P-KL of one chunk. The formula is that of xtoken.reference.pkl.
//
// With e the student's exponentials (or, for several tokens, their mean distribution; Z is then 1), S = sum_s w_s e_s
// where w_s is the sum of row s of W in the columns, D = S + eps Z, x = W^T e and x' = x + eps D:
//   log(m + eps) = log x' - log D,     u_t = (D / gamma) dL/dm_t up to the sign in gamma,    B = sum_t x_t u_t / D,
//   dL/dlogit_s = e_s gamma / (D temperature) (h_s - B (w_s + eps)),    h = W u.
// For KL(q || m): u = f / x', gamma = -D / sum f, with f the teacher's exponentials; for the reverse u = dL/dm, gamma
// = 1. The last line holds for one token: sum_s e_s (h_s - B (w_s + eps)) = 0 exactly, so the softmax needs no inner
// product. For several it is needed, and dL/dp is then v_s = gamma / D (h_s - B w_s). For mixed divergences u is dL/dm
// too; with merge="chain" they are of c_T q and c_S m, where c is the probability of the realised later tokens.
//
// Where nearly all mass is on one token, h_s - B cancels there. B is two floats, and that token's gradient is set to
// what makes the row's sum zero.
//
// Everything is in the order of the student's rows but f (for the reverse and mixed divergences: log q), which comes in
// that of the teacher's columns and is put into memory. For a pair of a row and a column (see plan.h) x, u and h are
// then passed through in order. Columns without entries have x = 0: only the sum of f over them counts.
#include "cpu/divergence.h"
#include "cpu/rows.h"
#include "losses/pkl/params.h"

namespace xtoken::cpu::XTOKEN_LEVEL {
namespace {

constexpr float tiny_share = 1e-3f;  // below this mass in the columns, eps counts for rows without entries too

// Calls body(n, total) with the weighted sums n ... n + 15 of elements of `values`, each with `remainder` times b.
template <typename Body>
void each_sum(const SumsView& sums, const float* values, float b, Body body) {
    for (int64_t k = 0; k < sums.slices; ++k) {
        Floats total = load(sums.remainder + lanes * k) * broadcast(b);
        for (int64_t i = lanes * sums.start[k]; i < lanes * sums.start[k + 1]; i += lanes) {
            total = fma(gather(values, sums.index + i), load(sums.weight + i), total);
        }
        body(lanes * k, total);
    }
}

// A factor that is added with two floats' precision.
struct Pair {
    float high, low;
    explicit Pair(double value) : high(static_cast<float>(value)), low(static_cast<float>(value - high)) {}
    Floats add_to(Floats x) const { return (x + broadcast(high)) + broadcast(low); }
};

// Replaces the gradient of a token with most of the mass by minus the sum of all others.
class Peak {
  public:
    explicit Peak(const Normaliser& one) : half_(static_cast<float>(one.total / 2)) {
        alignas(64) float lane[lanes];
        store(lane, one.exp(broadcast(one.top)));
        possible_ = !(lane[0] < 0.99f * half_);
    }
    void see(int64_t i, Floats e, Floats g) {
        if (!possible_) return;
        if (++count_ % (flush / lanes) == 0) flush_part();
        const uint32_t peak = bits(greater(e, broadcast(half_)));
        if (peak != 0) {
            index_ = i;
            for (uint32_t rest = peak >> 1; rest != 0; rest >>= 1) ++index_;
            alignas(64) float lane[lanes];
            store(lane, e);
            mass_ = lane[index_ - i];
            g = select(from_bits(peak), broadcast(0.0f), g);
        }
        part_ += g;
    }
    bool found() const { return index_ >= 0; }
    int64_t index() const { return index_; }
    float mass() const { return mass_; }
    float corrected(double others = 0) {
        flush_part();
        return static_cast<float>(-(sum_.total() + others));
    }

  private:
    void flush_part() {
        sum_.add(part_);
        part_ = broadcast(0.0f);
    }
    float half_, mass_ = 0;
    bool possible_;
    int64_t index_ = -1, count_ = 0;
    Floats part_ = broadcast(0.0f);
    DoubleSum sum_;
};

template <typename T>
void put(void* row, int64_t i, float x, const T*) {
    static_cast<T*>(row)[i] = narrowed<T>(x);
}

class Chunk {
  public:
    Chunk(const PklParams& p, int64_t k, float* workspace)
        : p_(p), plan_(*p.plan), k_(k), lowest_(p.lowest), eps_(p.epsilon) {
        const int64_t rows = padded(plan_.rows), columns = padded(plan_.columns);
        e_ = workspace;
        f_ = e_ + rows + lanes;
        h_ = f_ + columns + lanes;
        row_ = p.student_rows.start[k];
        count_ = p.merge == Merge::first ? 1 : p.student_rows.count[k];
        teacher_row_ = p.teacher_rows.start[k];
        teacher_count_ = p.merge == Merge::first ? 1 : p.teacher_rows.count[k];
    }

    void run(float* weight_sum) {
        merged_ = p_.merge == Merge::mean ? count_ : 1;
        student();
        masses();
        column_masses();
        if (p_.merge == Merge::chain) {
            later_student_ = later_log_probability(p_.student, p_.student_rows, row_, count_);
            later_teacher_ = later_log_probability(p_.teacher, p_.teacher_rows, teacher_row_, teacher_count_);
        }
        columns();

        double factor = 1, later_factor = 0;
        if (p_.divergence.is_mixed()) {
            factor = ::exp(later_student_);
            later_factor = factor * later_slope_;
        } else if (p_.merge == Merge::chain) {
            const double c = ::exp(p_.reverse ? later_student_ : later_teacher_);
            const double difference = later_student_ - later_teacher_;
            loss_ = c * (loss_ + (p_.reverse ? difference : -difference));
            factor = c;
            later_factor = p_.reverse ? loss_ + c : -c;
        }
        const double square = p_.temperature * p_.temperature;
        p_.losses[k_] = loss_ * square;
        const double scale = (p_.scale == nullptr ? 1.0 : p_.scale[k_]) * square;
        if (p_.grad.data == nullptr && weight_sum == nullptr) {
            for (int64_t i = 0; i < count_; ++i) label_only(row_ + i, nullptr);
            return;
        }
        unit_ = scale * factor * gamma_ / d_;
        if (weight_sum != nullptr) add_weight_gradient(weight_sum);
        if (p_.grad.data == nullptr) return;
        constant_ = -b_ * (is_single_ ? 1 + eps_ : 1.0);
        row_sums();
        if (is_single_) {
            single_gradient();
        } else {
            token_gradients();
        }
        for (int64_t i = 1; p_.merge == Merge::chain && i < count_; ++i) {
            later_gradient(row_ + i, scale * later_factor / p_.temperature);
        }
    }

  private:
    // The exponentials of student row r into `out`, compact; out has room for 16 more.
    Normaliser compact_exponentials(int64_t r, float* out) {
        const int64_t n = plan_.student_size;
        const Normaliser result = typed(p_.student.type, p_.student.row(r), [&](const auto* z) {
            const WholeRow<typename Element_of<decltype(*z)>::type> row{z};
            if (plan_.active_bits == nullptr) {
                return exponentials(row, n, lowest_, p_.temperature, [&](int64_t i, Floats e) { store(out + i, e); });
            }
            int64_t at = 0;
            return exponentials(row, n, lowest_, p_.temperature, [&](int64_t i, Floats e) {
                if (i == 0) at = 0;
                const uint32_t kept = plan_.active_bits[i / lanes];
                if (kept != 0) at += compress(out + at, from_bits(kept), e);
            });
        });
        for (int64_t i = plan_.rows; i < padded(plan_.rows) + lanes; ++i) out[i] = 0.0f;
        return result;
    }

    void student() {
        if (merged_ == 1) {
            normaliser_ = compact_exponentials(row_, e_);
            z_total_ = normaliser_.total;
            is_single_ = !normaliser_.exp.raises();
        }
        if (!is_single_) average();
    }

    // The mean distribution.
    void average() {
        const int64_t rows = padded(plan_.rows);
        z_total_ = 1;
        for (int64_t i = 0; i < merged_; ++i) {
            const Normaliser one = compact_exponentials(row_ + i, h_);
            const Floats share = broadcast(static_cast<float>(1 / (one.total * static_cast<double>(merged_))));
            for (int64_t s = 0; s < rows; s += lanes) {
                const Floats p = load(h_ + s) * share;
                store(e_ + s, i == 0 ? p : load(e_ + s) + p);
            }
        }
        for (int64_t i = 0; i < lanes; ++i) e_[rows + i] = 0.0f;
    }

    // S and D.
    void masses() {
        double s = z_total_;
        bool known = plan_.active_bits == nullptr && is_single_;
        if (known) {
            double missing = 0;
            for (int64_t i = 0; i < plan_.num_deficient; ++i) {
                const int32_t row = plan_.deficient[i];
                missing += (1 - static_cast<double>(plan_.row_weight[row])) * static_cast<double>(e_[row]);
            }
            known = missing < 0.5 * s && missing > -0.5 * s;
            s -= missing;
        }
        if (!known) {
            DoubleSum total;
            for (int64_t i = 0; i < plan_.rows; i += lanes) total.add(load(e_ + i) * load(plan_.row_weight + i));
            s = total.total();
        }
        d_ = s + eps_ * z_total_;
    }

    // x of the columns that are no pair's, in the place of their u: gathered while e is in the caches.
    void column_masses() {
        each_sum(plan_.column_sums, e_, 0.0f, [&](int64_t n, Floats x) { store(others() + n, x); });
    }

    float* others() const { return h_ + padded(plan_.rows) + lanes; }

    void columns() {
        const int64_t teachers = p_.merge == Merge::mean ? teacher_count_ : 1;
        for (int64_t i = 0; i < lanes; ++i) f_[padded(plan_.columns) + i] = absent();
        if (p_.divergence.is_mixed()) {
            log_probabilities(teachers);
            mixed_columns();
        } else if (p_.reverse) {
            log_probabilities(teachers);
            reverse_columns();
        } else {
            forward_columns(teachers == 1 ? one_teacher() : several_teachers(teachers));
        }
    }

    // Of a teacher's distribution q = f / total in the columns: sum f log f, and sum f of those with entries and of
    // those without.
    struct Teacher {
        double total, entropy, mass, empty;
    };

    // f of one teacher row, its exponentials.
    Teacher one_teacher() {
        Teacher result{};
        each_teacher_row(0, [&](const auto& row) {
            const int64_t n = plan_.columns;
            DoubleSum products, empty;
            Floats product_part = broadcast(0.0f), empty_part = product_part;
            const auto restart = [&] {
                products = empty = DoubleSum();
                product_part = empty_part = broadcast(0.0f);
            };
            const auto body = [&](int64_t i, Floats f, Floats, Floats cut) {
                if (i == 0) restart();
                store(f_ + i, f);
                product_part = fma(f, cut, product_part);
                empty_part += select(from_bits(plan_.empty_bits[i / lanes]), f, broadcast(0.0f));
                if (i % flush == flush - lanes) {
                    products.add(product_part);
                    empty.add(empty_part);
                    product_part = empty_part = broadcast(0.0f);
                }
            };
            const Normaliser q = each_exponential(row, n, lowest_, p_.temperature, body);
            products.add(product_part);
            empty.add(empty_part);
            const double without = empty.total();
            result = {q.total, products.total() / p_.temperature, q.total - without, without};
        });
        return result;
    }

    // f_ = log q = mean over the teacher rows of (y / temperature) + a constant.
    void log_probabilities(int64_t teachers) {
        const int64_t n = plan_.columns;
        double constant = 0;
        for (int64_t j = 0; j < teachers; ++j) {
            each_teacher_row(j, [&](const auto& row) {
                const Normaliser q = exponentials(row, n, lowest_, p_.temperature, [](int64_t, Floats) {});
                // y is taken relative to a number near its largest, so that floats are exact enough
                each_vector(row, n, [&](int64_t i, Floats y, int64_t) {
                    const Floats z = at_least(y, lowest_) - broadcast(q.centre);
                    store(f_ + i, j == 0 ? z : load(f_ + i) + z);
                });
                constant -= ::log(q.total);
            });
        }
        const Floats inverse = broadcast(static_cast<float>(1 / (p_.temperature * static_cast<double>(teachers))));
        const Floats offset = broadcast(static_cast<float>(constant / static_cast<double>(teachers)));
        for (int64_t i = 0; i < n; i += lanes) store(f_ + i, fma(load(f_ + i), inverse, offset));
    }

    // f = q of several teacher rows, which need not sum to 1.
    Teacher several_teachers(int64_t teachers) {
        log_probabilities(teachers);
        const Exponential exp = Exponential::around(0.0f, -1e30f, 1.0);
        DoubleSum products, mass, empty;
        for (int64_t i = 0; i < plan_.columns; i += lanes) {
            const Floats log_q = load(f_ + i);
            const Floats q = select(first(plan_.columns - i), exp(log_q), broadcast(0.0f));
            store(f_ + i, q);
            products.add(q * log_q);
            const Mask without = from_bits(plan_.empty_bits[i / lanes]);
            mass.add(select(without, broadcast(0.0f), q));
            empty.add(select(without, q, broadcast(0.0f)));
        }
        return {1.0, products.total(), mass.total(), empty.total()};
    }

    // f of no column; as a logarithm it is a probability of 0.
    float absent() const { return p_.divergence.is_mixed() ? -1e30f : 0.0f; }

    // Calls u = body(x, f) for the columns with entries and stores u; x is 0 and f absent in lanes without a column.
    // Calls add() after at most `flush` elements.
    template <typename Body, typename Add>
    void each_column(Body body, Add add) {
        const int64_t rows = padded(plan_.rows);
        const bool masked = p_.reverse || p_.divergence.is_mixed();  // otherwise nothing comes from lanes where f is 0
        const Floats none = broadcast(absent());
        // From the end: what was written last is in the caches.
        for (int64_t end = rows; end > 0;) {
            const int64_t begin = (end - 1) / flush * flush;
            for (int64_t i = end - lanes; i >= begin; i -= lanes) {
                const Mask paired = from_bits(plan_.paired_bits[i / lanes]);
                const int32_t run = plan_.partner_run[i / lanes];
                const Floats f = run < 0 ? gather(f_, plan_.partner + i) : select(paired, load(f_ + run), none);
                const Floats e = load(e_ + i);
                store(h_ + i, body(masked ? select(paired, e, broadcast(0.0f)) : e, f));
            }
            add();
            end = begin;
        }
        for (int64_t n = 0; n < lanes * plan_.column_sums.slices; n += lanes) {
            store(others() + n, body(load(others() + n), gather(f_, plan_.column_sums.owner + n)));
            if (n % flush == flush - lanes) add();
        }
        add();
        for (int64_t i = 0; i < lanes; ++i) h_[rows + i] = 0.0f;
    }

    void forward_columns(const Teacher& q) {
        const Floats epsilon = broadcast(static_cast<float>(eps_ * d_));
        DoubleSum products, mass;
        Floats product_part = broadcast(0.0f), mass_part = product_part;
        each_column(
            [&](Floats x, Floats f) {
                const Floats xe = x + epsilon;
                const Floats u = f * reciprocal(xe);
                mass_part = fma(x, u, mass_part);
                product_part = fma(f, log(xe), product_part);
                return u;
            },
            [&] {
                products.add(product_part);
                mass.add(mass_part);
                product_part = mass_part = broadcast(0.0f);
            });
        gamma_ = -d_ / q.total;
        b_ = mass.total() / d_;
        // D as a float, like x: where one column has all of the mass, its m is 1.
        const double log_d = ::log(static_cast<double>(static_cast<float>(d_)));
        const double log_m = products.total() - q.mass * log_d + q.empty * ::log(eps_);
        loss_ = (q.entropy - log_m) / q.total - ::log(q.total);
    }

    // Columns without entries have neither loss nor u, since x = 0.
    void reverse_columns() {
        const Floats epsilon = broadcast(static_cast<float>(eps_ * d_));
        const Floats per_d = broadcast(static_cast<float>(1 / d_));
        DoubleSum loss, mass;
        Floats loss_part = broadcast(0.0f), mass_part = loss_part;
        each_column(
            [&](Floats x, Floats log_q) {
                const Floats xe = x + epsilon;
                const Floats difference = log(xe * per_d) - log_q;
                const Floats u = difference + x / xe;
                loss_part = fma(x, difference, loss_part);
                mass_part = fma(x, u, mass_part);
                return u;
            },
            [&] {
                loss.add(loss_part);
                mass.add(mass_part);
                loss_part = mass_part = broadcast(0.0f);
            });
        gamma_ = 1;
        b_ = mass.total() / d_;
        loss_ = loss.total() / d_;
    }

    // Columns without entries have m = 0, but not q.
    void mixed_columns() {
        const MixedDivergence divergence(p_.divergence);
        const Exponential exp = Exponential::around(0.0f, -1e30f, 1.0);
        const Floats epsilon = broadcast(static_cast<float>(eps_ * d_));
        const Floats per_d = broadcast(static_cast<float>(1 / d_));
        const Floats later = broadcast(static_cast<float>(later_teacher_ - later_student_));
        DoubleSum of_teacher, of_student, mass, slope, share;
        Floats of_teacher_part = broadcast(0.0f), of_student_part = of_teacher_part, mass_part = of_teacher_part;
        Floats slope_part = of_teacher_part, share_part = of_teacher_part;
        const auto body = [&](Floats x, Floats log_q) {
            const Floats xe = x + epsilon;
            const MixedDivergence::Terms terms = divergence((log_q - log(xe * per_d)) + later);
            const Floats u = divergence.slope(terms, x / xe);
            of_teacher_part = fma(exp(log_q), terms.of_teacher, of_teacher_part);
            of_student_part = fma(x, terms.of_student, of_student_part);
            mass_part = fma(x, u, mass_part);
            slope_part = fma(x, divergence.slope(terms), slope_part);
            share_part += terms.share;
            return u;
        };
        const auto add = [&] {
            of_teacher.add(of_teacher_part);
            of_student.add(of_student_part);
            mass.add(mass_part);
            slope.add(slope_part);
            share.add(share_part);
            of_teacher_part = of_student_part = mass_part = slope_part = share_part = broadcast(0.0f);
        };
        each_column(body, add);
        for (int64_t i = 0; i < plan_.columns; i += lanes) {
            const uint32_t empty = plan_.empty_bits[i / lanes];
            if (empty != 0) body(broadcast(0.0f), select(from_bits(empty), load(f_ + i), broadcast(absent())));
            if (i % flush == flush - lanes) add();
        }
        add();
        gamma_ = 1;
        b_ = mass.total() / d_;
        loss_ = ::exp(later_teacher_) * of_teacher.total() + ::exp(later_student_) * of_student.total() / d_;
        const double pulled = p_.divergence.teacher * (1 - p_.divergence.mixture);
        later_slope_ = slope.total() / d_ - pulled * eps_ * share.total();
    }

    // h of the rows that are no part of a pair; but nothing of those without entries.
    void row_sums() {
        const SumsView& sums = plan_.row_sums;
        each_sum(sums, h_, static_cast<float>(b_), [&](int64_t n, Floats total) {
            alignas(64) float lane[lanes];
            store(lane, total);
            for (int64_t i = 0; i < lanes; ++i) h_[sums.owner[n + i]] = lane[i];
        });
    }

    template <typename Body>
    void each_teacher_row(int64_t j, Body body) {
        typed(p_.teacher.type, p_.teacher.row(teacher_row_ + j), [&](const auto* y) {
            using T = typename Element_of<decltype(*y)>::type;
            if (plan_.chosen == nullptr) {
                body(WholeRow<T>{y});
            } else {
                body(PickedRow<T>{y, plan_.chosen});
            }
        });
    }

    // Sum over the rows but the first of log p(the token that follows).
    double later_log_probability(const Logits& logits, const ChunkRows& rows, int64_t start, int64_t count) {
        double result = 0;
        for (int64_t r = start + 1; r < start + count; ++r) {
            result += typed(logits.type, logits.row(r), [&](const auto* z) {
                using T = typename Element_of<decltype(*z)>::type;
                const Normaliser all =
                    exponentials(WholeRow<T>{z}, logits.width, lowest_, p_.temperature, [](int64_t, Floats) {});
                const float realised = at_least(widened(z[rows.next[r]]), lowest_);
                return static_cast<double>(realised) / p_.temperature - all.log_sum();
            });
        }
        return result;
    }

    Target target(int64_t r) const { return {p_.grad.row(r), plan_.student_size, p_.grad.width}; }

    // The label of row r, whose normaliser at the chunk's temperature is `known`, if it is.
    template <typename T>
    LabelTerm label_of(int64_t r, const T* z, const Normaliser* known) const {
        return label_term_if_any(p_.labels, r, z, plan_.student_size, lowest_, p_.temperature == 1.0 ? known : nullptr);
    }

    void label_only(int64_t r, const Normaliser* known) {
        if (p_.labels.ids == nullptr) return;
        typed(p_.student.type, p_.student.row(r), [&](const auto* z) { label_of(r, z, known); });
    }

    // h, with the constant.
    Floats centred(int64_t i, const Pair& constant) const { return constant.add_to(load(h_ + i)); }

    // A single token: gradient of its row.
    void single_gradient() {
        const Floats factor = broadcast(static_cast<float>(unit_ / p_.temperature));
        const Pair constant(constant_);
        Peak peak(normaliser_);
        typed(p_.student.type, p_.student.row(row_), [&](const auto* z) {
            const LabelTerm label = label_of(row_, z, &normaliser_);
            if (plan_.active_bits == nullptr) {
                const bool again = label.present && p_.temperature != 1.0;
                // h_s - B (w_s + eps) of rows without entries is B eps: exact only if it is not a difference
                for (int64_t j = 0; j < plan_.num_empty; ++j) {
                    const int32_t i = plan_.empty[j];
                    h_[i] = e_[i];
                    e_[i] = 0.0f;
                }
                const Floats weight = broadcast(again ? 0.0f : label.weight);
                // otherwise it becomes a call for each vector
                write_row(target(row_), z, [&](int64_t i) __attribute__((always_inline)) {
                    const Floats e = load(e_ + i);
                    const Floats g = e * (centred(i, constant) * factor);
                    peak.see(i, e, g);
                    if (!label.present) return g;
                    Floats x = fma(e, weight, g);
                    if (again) x = fma(label.exp(tail_load(z, i)), broadcast(label.weight), x);
                    return label.without_label(i, x);
                });
                const auto put_single = [&](int64_t i, float g, float e) {
                    if (label.present) {
                        g += (again ? exp_of(label.exp, widened(z[i])) : e) * label.weight;
                        if (i == label.label) g -= label.scale;
                    }
                    put(p_.grad.row(row_), i, g, z);
                };
                const auto rest = static_cast<float>(-unit_ / p_.temperature * b_ * eps_);
                double others = 0;
                for (int64_t j = 0; j < plan_.num_empty; ++j) {
                    const float e = h_[plan_.empty[j]];
                    others += static_cast<double>(e * rest);
                    put_single(plan_.empty[j], e * rest, e);
                }
                if (peak.found()) put_single(peak.index(), peak.corrected(others), peak.mass());
                return;
            }
            for (int64_t i = 0; i < plan_.rows; i += lanes) {
                const Floats e = load(e_ + i);
                const Floats g = e * (centred(i, constant) * factor);
                peak.see(i, e, g);
                store(e_ + i, g);
            }
            const bool tiny = d_ < tiny_share * z_total_;
            if (peak.found() && !tiny) e_[peak.index()] = peak.corrected();
            const float rest = tiny ? static_cast<float>(-unit_ / p_.temperature * b_ * eps_) : 0.0f;
            write_expanded(row_, z, rest, normaliser_.exp, label, e_);
        });
    }

    // The row of a subset: compact gradients in their places, rest * exp(z) in the others, and the label.
    template <typename T>
    void write_expanded(int64_t r, const T* z, float rest, const Exponential& exp, const LabelTerm& label,
                        const float* compact) {
        if (exp.raises()) return write_raised(r, z, rest, exp, label, compact);
        const bool same = label.present && p_.temperature == 1.0;
        const Floats active = broadcast(same ? label.weight : 0.0f);
        const Floats inactive = active + broadcast(rest);
        const bool plain = rest == 0.0f && !label.present;
        // otherwise it becomes a call for each vector
        write_row(target(r), z, [&](int64_t i) __attribute__((always_inline)) {
            const uint32_t kept = plan_.active_bits[i / lanes];
            const Floats g = expanded(kept, compact);
            if (plain) return g;
            const Floats x = tail_load(z, i);
            Floats y = fma(exp(x), select(from_bits(kept), active, inactive), g);
            if (label.present && !same) y = fma(label.exp(x), broadcast(label.weight), y);
            return label.present ? label.without_label(i, y) : y;
        });
    }

    // The same where the lowest logits have mass.
    template <typename T>
    void write_raised(int64_t r, const T* z, float rest, const Exponential& exp, const LabelTerm& label,
                      const float* compact) {
        const Floats zero = broadcast(0.0f), inactive = broadcast(rest);
        write_row(target(r), z, [&](int64_t i) {
            const uint32_t kept = plan_.active_bits[i / lanes];
            const Floats x = tail_load(z, i), own = select(from_bits(kept), zero, inactive);
            const Floats g = unless_raised(x, lowest_, fma(exp(x), own, expanded(kept, compact)));
            return with_label(label, i, x, g);
        });
    }

    // The next of compact values, in these lanes.
    static Floats expanded(uint32_t kept, const float*& compact) {
        if (kept == 0) return broadcast(0.0f);
        const Floats values = expand(compact, from_bits(kept));
        for (uint32_t m = kept; m != 0; m &= m - 1) ++compact;
        return values;
    }

    // g with the label's part, of logits x.
    static Floats with_label(const LabelTerm& label, int64_t i, Floats x, Floats g) {
        if (!label.present) return g;
        return label.without_label(i, fma(label.exp(x), broadcast(label.weight), g));
    }

    // Any others: v once, then each token's row with its own inner product.
    void token_gradients() {
        const Pair constant(constant_);
        float *v = e_, *token = h_;  // nobody reads the mean distribution any more, nor h once v is there
        for (int64_t i = 0; i < padded(plan_.rows); i += lanes) store(v + i, centred(i, constant));
        for (int64_t j = 0; j < plan_.num_empty; ++j) v[plan_.empty[j]] = 0.0f;
        for (int64_t r = row_; r < row_ + merged_; ++r) {
            const Normaliser one = compact_exponentials(r, token);
            DoubleSum inner;
            for (int64_t i = 0; i < plan_.rows; i += lanes) inner.add(load(token + i) * load(v + i));
            const Pair mean(-inner.total() / one.total);
            const double share = unit_ / (p_.temperature * static_cast<double>(merged_) * one.total);
            const Floats factor = broadcast(static_cast<float>(share));
            Peak peak(one);
            for (int64_t i = 0; i < plan_.rows; i += lanes) {
                const Floats e = load(token + i);
                const Floats g = e * (mean.add_to(load(v + i)) * factor);
                peak.see(i, e, g);
                store(token + i, g);
            }
            typed(p_.student.type, p_.student.row(r), [&](const auto* z) {
                const LabelTerm label = label_of(r, z, &one);
                if (plan_.active_bits != nullptr) {
                    const double rest = share * static_cast<double>(mean.high);
                    return write_expanded(r, z, static_cast<float>(rest), one.exp, label, token);
                }
                if (peak.found()) token[peak.index()] = peak.corrected();
                write_row(target(r), z, [&](int64_t i) {
                    const Floats x = tail_load(z, i);
                    return with_label(label, i, x, unless_raised(x, lowest_, load(token + i)));
                });
            });
        }
    }

    // A later row under merge="chain": factor * (onehot - softmax).
    void later_gradient(int64_t r, double factor) {
        typed(p_.student.type, p_.student.row(r), [&](const auto* z) {
            using T = typename Element_of<decltype(*z)>::type;
            const Normaliser all =
                exponentials(WholeRow<T>{z}, plan_.student_size, lowest_, p_.temperature, [](int64_t, Floats) {});
            LabelTerm onehot;
            onehot.label = p_.student_rows.next[r];
            onehot.scale = static_cast<float>(-factor);
            const Floats weight = broadcast(static_cast<float>(-factor / all.total));
            const LabelTerm label = label_of(r, z, &all);
            write_row(target(r), z, [&](int64_t i) {
                const Floats x = tail_load(z, i);
                return with_label(label, i, x, unless_raised(x, lowest_, onehot.without_label(i, all.exp(x) * weight)));
            });
        });
    }

    // d loss / d W[s, t] = e_s gamma / D (u_t - B).
    void add_weight_gradient(float* weight_sum) {
        const auto factor = static_cast<float>(unit_), b = static_cast<float>(b_);
        for (int64_t e = 0; e < plan_.entries; ++e) {
            weight_sum[e] += e_[plan_.entry_row[e]] * factor * (h_[plan_.entry_u[e]] - b);
        }
    }

    template <typename T>
    Floats tail_load(const T* z, int64_t i) const {
        return load(z + i, plan_.student_size - i, broadcast(0.0f));
    }

    static float exp_of(const Exponential& exp, float x) {
        alignas(64) float lane[lanes];
        store(lane, exp(broadcast(x)));
        return lane[0];
    }

    const PklParams& p_;
    const PklPlanView& plan_;
    int64_t k_;
    float lowest_;
    double eps_;
    float* e_;  // [padded rows, 16 zeros] the student's exponentials or mean distribution
    float* f_;  // [padded columns, 16 zeros] the teacher's, or log q
    float* h_;  // [padded rows, 16 zeros, column sums] u of the pairs in their rows' places, then h; u of the other
                // columns
    int64_t row_, count_, teacher_row_, teacher_count_, merged_ = 1;
    bool is_single_ = false;  // one token, whose row has no mass on logits below the lowest
    Normaliser normaliser_{Exponential::around(0.0f, 0.0f, 1.0), 0.0f, 0.0};
    double z_total_ = 0, d_ = 0, gamma_ = 0, b_ = 0, unit_ = 0, constant_ = 0, loss_ = 0;
    double later_student_ = 0, later_teacher_ = 0;  // log c
    double later_slope_ = 0;                        // dL/dlog c_S, divided by c_S
};

}  // namespace

void pkl_chunk(const PklParams& params, int64_t k, float* workspace, float* weight_sum) {
    Chunk(params, k, workspace).run(weight_sum);
}

}  // namespace xtoken::cpu::XTOKEN_LEVEL
