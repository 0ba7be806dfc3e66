// KL for one shared tokenizer: one row.
//
// With a, b the student's and the teacher's logits relative to numbers near their largest, e = exp(a / tau) and f =
// exp(b / tau), all on the columns, and E, F the sums of e and f:
//   KL(q || p) = sum f (b - a) / (tau F) + log E - log F,     d / d logit = (e / E - f / F) / tau
//   KL(p || q) = sum e (a - b) / (tau E) + log F - log E,     d / d logit = e / E ((a - b) - mean of it) / tau^2
// where the mean is sum e (a - b) / E. The first pass finds the three sums, reading both rows once; the second computes
// the exponentials again, which costs less than keeping them. Columns of a subset are copied next to each other first.
//
// A mixed divergence D has d / d logit = p (dD / dp - sum p dD / dp) / tau. It needs log q - log p, so a pass after the
// first sums D and p dD / dp.
#include "cpu/divergence.h"
#include "cpu/rows.h"
#include "losses/kd/params.h"

namespace xtoken::cpu::XTOKEN_LEVEL {
namespace {

Floats relative(Floats x, float lowest, float centre) { return at_least(x, lowest) - broadcast(centre); }

template <typename T>
float largest_of_first(const T* row, int64_t n, float lowest) {
    Floats top = broadcast(lowest);
    each_vector(WholeRow<T>{row}, smaller(n, 4096),
                [&](int64_t, Floats x, int64_t count) { top = max(select(first(count), x, broadcast(lowest)), top); });
    return largest(top);
}

// The sums of a pair of rows.
struct Comparison {
    Normaliser student, teacher;
    double mean;  // of the difference of relative logits, under the distribution that the KL is taken over
};

template <typename S, typename T>
Comparison compare(const S* z, const T* y, int64_t n, const KdChunks& params) {
    const float lowest = params.lowest;
    const double tau = params.temperature;
    const int64_t whole = n / lanes * lanes;
    const WholeRow<S> student{z};
    const WholeRow<T> teacher{y};
    float z_centre = largest_of_first(z, n, lowest), y_centre = largest_of_first(y, n, lowest);
    for (;;) {
        const ElementExponential<S> p{Exponential::around(z_centre, lowest, tau)};
        const ElementExponential<T> q{Exponential::around(y_centre, lowest, tau)};
        const Floats zero = broadcast(0.0f);
        DoubleSum p_total, q_total, products;
        Floats p_part = zero, q_part = zero, product_part = zero;
        Floats z_top = broadcast(z_centre), y_top = broadcast(y_centre);
        const auto step = [&](Floats zi, Floats yi, Floats e, Floats f) {
            const Floats a = relative(zi, lowest, z_centre), b = relative(yi, lowest, y_centre);
            p_part += e;
            q_part += f;
            product_part = params.reverse ? fma(e, a - b, product_part) : fma(f, b - a, product_part);
        };
        const auto add = [&] {
            p_total.add(p_part);
            q_total.add(q_part);
            products.add(product_part);
            p_part = q_part = product_part = zero;
        };
        for (int64_t begin = 0; begin < whole; begin += flush) {
            for (int64_t i = begin; i < smaller(begin + flush, whole); i += lanes) {
                const Floats zi = student.at(i), yi = teacher.at(i);
                z_top = max(zi, z_top);
                y_top = max(yi, y_top);
                step(zi, yi, p(zi), q(yi));
            }
            add();
        }
        if (whole < n) {
            const Mask valid = first(n - whole);
            const Floats zi = load(z + whole, n - whole, broadcast(z_centre));
            const Floats yi = load(y + whole, n - whole, broadcast(y_centre));
            z_top = max(zi, z_top);
            y_top = max(yi, y_top);
            step(zi, yi, select(valid, p(zi), zero), select(valid, q(yi), zero));
            add();
        }
        // As in `exponentials`: once more if the largest numbers were not among the first.
        const float z_found = largest(z_top), y_found = largest(y_top);
        const bool z_grew = z_found > z_centre + 30 * tau && z_found < 3e38f;
        const bool y_grew = y_found > y_centre + 30 * tau && y_found < 3e38f;
        if (z_grew) z_centre = z_found;
        if (y_grew) y_centre = y_found;
        if (z_grew || y_grew) continue;
        const double over = params.reverse ? p_total.total() : q_total.total();
        return {
            {p, z_centre, p_total.total(), lowest}, {q, y_centre, q_total.total(), lowest}, products.total() / over};
    }
}

// The gradient of the KL, times `scale`.
template <typename S, typename T>
struct Slope {
    Slope(const Comparison& rows, const KdChunks& params, double scale)
        : p{rows.student.exp},
          q{rows.teacher.exp},
          lowest(params.lowest),
          z_centre(rows.student.centre),
          y_centre(rows.teacher.centre),
          reverse(params.reverse) {
        const double factor = reverse ? scale : scale * params.temperature;
        student = static_cast<float>(factor / rows.student.total);
        teacher = static_cast<float>(factor / rows.teacher.total);
        mean_high = static_cast<float>(rows.mean);
        mean_low = static_cast<float>(rows.mean - static_cast<double>(mean_high));
    }

    // Of 16 logits z and y, where e are p's exponentials.
    Floats operator()(Floats z, Floats y, Floats e) const {
        Floats g;
        if (reverse) {
            const Floats difference = relative(z, lowest, z_centre) - relative(y, lowest, y_centre);
            g = e * broadcast(student) * ((difference - broadcast(mean_high)) - broadcast(mean_low));
        } else {
            g = fma(e, broadcast(student), broadcast(0.0f) - q(y) * broadcast(teacher));
        }
        return unless_raised(z, lowest, g);
    }

    ElementExponential<S> p;
    ElementExponential<T> q;
    float lowest, z_centre, y_centre;
    bool reverse;
    float student, teacher, mean_high, mean_low;
};

// The same of a mixed divergence, and its terms.
template <typename S, typename T>
struct MixedSlope {
    MixedSlope(const Comparison& rows, const KdChunks& params)
        : p{rows.student.exp},
          q{rows.teacher.exp},
          divergence(params.divergence),
          lowest(params.lowest),
          z_centre(rows.student.centre),
          y_centre(rows.teacher.centre),
          inverse_temperature(static_cast<float>(1 / params.temperature)),
          student(static_cast<float>(1 / rows.student.total)),
          teacher(static_cast<float>(1 / rows.teacher.total)) {
        const double logs = ::log(rows.student.total) - ::log(rows.teacher.total);
        offset_high = static_cast<float>(logs);
        offset_low = static_cast<float>(logs - static_cast<double>(offset_high));
    }

    MixedDivergence::Terms terms(Floats z, Floats y) const {
        const Floats difference = relative(y, lowest, y_centre) - relative(z, lowest, z_centre);
        const Floats offset = broadcast(offset_high);
        return divergence(fma(difference, broadcast(inverse_temperature), offset) + broadcast(offset_low));
    }

    Floats operator()(Floats z, Floats y, Floats e) const {
        const Floats slope = divergence.slope(terms(z, y));
        const Floats g = e * broadcast(factor) * ((slope - broadcast(mean_high)) - broadcast(mean_low));
        return unless_raised(z, lowest, g);
    }

    ElementExponential<S> p;
    ElementExponential<T> q;
    MixedDivergence divergence;
    float lowest, z_centre, y_centre, inverse_temperature;
    float student, teacher;  // what makes exponentials probabilities
    float offset_high, offset_low, factor = 0, mean_high = 0, mean_low = 0;
};

// out[i] = row[index[i]]
template <typename T>
void pick(const T* row, const ColumnsView& columns, float* out) {
    for (int64_t i = 0; i < columns.count; i += lanes) store(out + i, gather(row, columns.ids + i));
}

class Row {
  public:
    Row(const KdChunks& params, int64_t k, float* workspace)
        : p_(params),
          k_(k),
          row_(params.student_rows.start[k]),
          size_(params.student.width),
          z_(workspace),
          y_(workspace + padded(params.set.count) + lanes) {}

    void run() {
        typed(p_.student.type, p_.student.row(row_), [&](const auto* z) {
            typed(p_.teacher.type, p_.teacher.row(p_.teacher_rows.start[k_]), [&](const auto* y) {
                if (p_.set.ids == nullptr) return all(z, y);
                pick(z, p_.set, z_);
                pick(y, p_.set, y_);
            });
            if (p_.set.ids != nullptr) subset(z);
        });
    }

  private:
    template <typename S, typename T>
    void all(const S* z, const T* y) {
        const Comparison rows = compare(z, y, size_, p_);
        if (p_.divergence.is_mixed()) {
            write_all(z, y, rows, mixed(rows, z, y, size_));
        } else {
            write_all(z, y, rows, finish<S, T>(rows));
        }
    }

    template <typename S, typename T, typename Gradient>
    void write_all(const S* z, const T* y, const Comparison& rows, const Gradient& slope) {
        const LabelTerm label = label_of(z, p_.temperature == 1.0 ? &rows.student : nullptr);
        if (p_.grad.data == nullptr) return;
        const bool same = p_.temperature == 1.0;
        write_row(target(), z, [&](int64_t i) {
            const Floats zi = tail_load(z, i), e = slope.p(zi);
            const Floats g = slope(zi, tail_load(y, i), e);
            return label.present ? with_label(label, i, same ? e : label.exp(zi), g) : g;
        });
    }

    template <typename S>
    void subset(const S* z) {
        const Comparison rows = compare(z_, y_, p_.set.count, p_);
        if (p_.divergence.is_mixed()) {
            write_subset(z, mixed(rows, z_, y_, p_.set.count));
        } else {
            write_subset(z, finish<float, float>(rows));
        }
    }

    template <typename S, typename Gradient>
    void write_subset(const S* z, const Gradient& slope) {
        const LabelTerm label = label_of(z, nullptr);
        if (p_.grad.data == nullptr) return;
        for (int64_t i = 0; i < p_.set.count; i += lanes) {
            const Floats zi = load(z_ + i);
            store(z_ + i, slope(zi, load(y_ + i), slope.p(zi)));
        }
        const float* compact = z_;
        write_row(target(), z, [&](int64_t i) {
            const uint32_t chosen = p_.set.bits[i / lanes];
            Floats g = broadcast(0.0f);
            if (chosen != 0) {
                g = expand(compact, from_bits(chosen));
                for (uint32_t m = chosen; m != 0; m &= m - 1) ++compact;
            }
            return label.present ? with_label(label, i, label.exp(tail_load(z, i)), g) : g;
        });
    }

    double scale() const { return p_.scale == nullptr ? 1.0 : p_.scale[k_]; }

    // Writes the loss; returns the gradient.
    template <typename S, typename T>
    Slope<S, T> finish(const Comparison& rows) {
        const double tau = p_.temperature;
        const double logs = ::log(rows.student.total) - ::log(rows.teacher.total);
        p_.losses[k_] = tau * tau * (rows.mean / tau + (p_.reverse ? -logs : logs));
        return Slope<S, T>(rows, p_, scale());
    }

    template <typename S, typename T>
    MixedSlope<S, T> mixed(const Comparison& rows, const S* z, const T* y, int64_t n) {
        MixedSlope<S, T> result(rows, p_);
        const Floats zero = broadcast(0.0f), student = broadcast(result.student), teacher = broadcast(result.teacher);
        DoubleSum losses, slopes;
        for (int64_t begin = 0; begin < n; begin += flush) {
            Floats loss = zero, slope = zero;
            for (int64_t i = begin; i < smaller(begin + flush, n); i += lanes) {
                const Floats zi = load(z + i, n - i, zero), yi = load(y + i, n - i, zero);
                const Mask valid = first(smaller(n - i, lanes));
                const Floats p = select(valid, result.p(zi) * student, zero);
                const Floats q = select(valid, result.q(yi) * teacher, zero);
                const MixedDivergence::Terms terms = result.terms(zi, yi);
                loss = fma(q, terms.of_teacher, fma(p, terms.of_student, loss));
                slope = fma(p, result.divergence.slope(terms), slope);
            }
            losses.add(loss);
            slopes.add(slope);
        }
        const double tau = p_.temperature, mean = slopes.total();
        p_.losses[k_] = tau * tau * losses.total();
        result.factor = static_cast<float>(scale() * tau / rows.student.total);
        result.mean_high = static_cast<float>(mean);
        result.mean_low = static_cast<float>(mean - static_cast<double>(result.mean_high));
        return result;
    }

    // flatten: a call that is left would keep the term in memory while the gradient is written
    template <typename S>
    __attribute__((flatten)) LabelTerm label_of(const S* z, const Normaliser* known) const {
        return label_term_if_any(p_.labels, row_, z, size_, p_.lowest, known);
    }

    static Floats with_label(const LabelTerm& label, int64_t i, Floats e, Floats g) {
        return label.without_label(i, fma(e, broadcast(label.weight), g));
    }

    template <typename T>
    Floats tail_load(const T* row, int64_t i) const {
        return load(row + i, size_ - i, broadcast(0.0f));
    }

    Target target() const { return {p_.grad.row(row_), size_, p_.grad.width}; }

    const KdChunks& p_;
    int64_t k_, row_, size_;
    float *z_, *y_;
};

}  // namespace

void kd_chunk(const KdChunks& params, int64_t k, float* workspace) { Row(params, k, workspace).run(); }

}  // namespace xtoken::cpu::XTOKEN_LEVEL
