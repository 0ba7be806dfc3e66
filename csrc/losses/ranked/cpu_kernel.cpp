// One chunk: a KL on the pairs, the sorted L1 elsewhere.
//
// With lp, lq the chunk's mean log-probabilities, g_v = d loss / d lp_v is -q_t on a pair (reverse: p_s (lp_s - lq_t +
// 1)) and sign * p_v outside. A row z_i of the n student rows gets d loss / d z_i = (g - softmax(z_i) sum g) / (n tau).
// `values` holds, in a unit of its own, g of the pairs by teacher id and behind them g of the students outside, so that
// one gather by `slot` finds every g.
#include "cpu/divergence.h"
#include "cpu/rows.h"
#include "losses/ranked/params.h"
#include "losses/ranked/sorted_l1.h"
#include "losses/ranked/steps.h"

namespace xtoken::cpu::XTOKEN_LEVEL {
namespace {

template <typename T>
T* take(char*& at, int64_t count) {
    T* result = reinterpret_cast<T*>(at);
    at += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return result;
}

constexpr float nothing = -3e38f;  // below every logit

// One side of a chunk. The mean logits of several rows are kept as a sum, at `count` times the temperature, each row
// relative to a logit near its largest, so that floats are exact enough.
struct Side {
    const float* logits;
    int64_t size, count;
    double temperature;
    float lowest, centre;
    Exponential exp;        // of `logits`
    double log_normaliser;  // of logits relative to the centre, mean over the rows

    Floats relative(Floats x) const { return at_least(x, lowest) - broadcast(centre); }
    // Probability in units of exp's results.
    double inverse() const {
        return ::exp((exp.log_unit() - static_cast<double>(centre) / temperature) - log_normaliser);
    }
};

template <typename T>
void add_row(const T* z, int64_t size, float lowest, float centre, bool begin, float* total) {
    for (int64_t i = 0; i < size; i += lanes) {
        const Floats x = at_least(load(z + i, size - i, broadcast(0.0f)), lowest) - broadcast(centre);
        store(total + i, begin ? x : load(total + i) + x);
    }
}

// `total` and `values` have room for whole vectors; `values`, if not null, gets the exponentials of the mean logits.
Side read_side(const Logits& logits, const ChunkRows& rows, int64_t k, const RankedParams& params, float* total,
               Normaliser* normalisers, float* values) {
    const int64_t start = rows.start[k], count = rows.count[k], size = logits.width;
    const bool single = count == 1;
    Side side{total,
              size,
              count,
              params.temperature * static_cast<double>(count),
              single ? params.lowest : nothing,
              0.0f,
              Exponential::around(0.0f, params.lowest, 1.0),
              0.0};
    for (int64_t i = 0; i < count; ++i) {
        typed(logits.type, logits.row(start + i), [&](const auto* z) {
            const auto row = WholeRow<typename Element_of<decltype(*z)>::type>{z};
            const auto keep = [&](int64_t j, Floats e) { store(values + j, e); };
            const auto drop = [](int64_t, Floats) {};
            const Normaliser one = single && values != nullptr
                                       ? exponentials(row, size, params.lowest, params.temperature, keep)
                                       : exponentials(row, size, params.lowest, params.temperature, drop);
            side.log_normaliser += ::log(one.total) / static_cast<double>(count);
            side.exp = one.exp;
            if (single) side.centre = one.centre;
            if (normalisers != nullptr) normalisers[i] = one;
            if (single && logits.type == Element::float32) return;
            add_row(z, size, params.lowest, single ? 0.0f : one.centre, i == 0, total);
        });
    }
    if (single && logits.type == Element::float32) side.logits = reinterpret_cast<const float*>(logits.row(start));
    if (!single) {
        const double centre = side.log_normaliser * side.temperature;
        side.exp = Exponential::around(static_cast<float>(centre), side.lowest, side.temperature);
        for (int64_t i = 0; values != nullptr && i < size; i += lanes) store(values + i, side.exp(load(total + i)));
    }
    return side;
}

struct PairSums {
    double loss;   // common part
    double total;  // sum of g over the pairs
};

// Reads `values` (the teacher's exponentials); but for the forward KL, replaces those of the pairs by g.
PairSums over_pairs(const PairsView& plan, const Side& student, const Side& teacher, bool reverse,
                    const Divergence& divergence, float* values) {
    // Log-probabilities of each side by themselves, so that equal ones differ by exactly 0; what the normalisers lose
    // as floats is added at the end.
    const float log_p = static_cast<float>(student.log_normaliser), log_q = static_cast<float>(teacher.log_normaliser);
    const double lost =
        (student.log_normaliser - static_cast<double>(log_p)) - (teacher.log_normaliser - static_cast<double>(log_q));
    const Floats student_inverse = broadcast(static_cast<float>(1 / student.temperature));
    const Floats teacher_inverse = broadcast(static_cast<float>(1 / teacher.temperature));
    const Floats zero = broadcast(0.0f);
    const bool mixed = divergence.is_mixed();
    const MixedDivergence mixture(divergence);
    DoubleSum mass, loss, teacher_loss;
    for (int64_t begin = 0; begin < teacher.size; begin += flush) {
        Floats mass_part = zero, loss_part = zero, teacher_part = zero;
        for (int64_t i = begin; i < smaller(begin + flush, teacher.size); i += lanes) {
            const uint32_t word = plan.common[i / lanes];
            if (word == 0) continue;
            const Mask common = from_bits(word);
            const Floats y = load(teacher.logits + i, teacher.size - i, zero);
            const Floats z = gather(student.logits, plan.partner + i);
            const Floats lq = fma(teacher.relative(y), teacher_inverse, broadcast(-log_q));
            const Floats lp = fma(student.relative(z), student_inverse, broadcast(-log_p));
            const Floats difference = lq - lp;
            if (mixed) {
                const Floats e = select(common, student.exp(z), zero), f = select(common, load(values + i), zero);
                const MixedDivergence::Terms terms = mixture(difference + broadcast(static_cast<float>(lost)));
                const Floats g = e * mixture.slope(terms);
                loss_part = fma(e, terms.of_student, loss_part);
                teacher_part = fma(f, terms.of_teacher, teacher_part);
                mass_part += g;
                store(values + i, select(common, g, load(values + i)));
            } else if (reverse) {
                const Floats e = select(common, student.exp(z), zero);
                const Floats term = fnma(e, difference, zero);
                mass_part += e;
                loss_part += term;
                store(values + i, select(common, term + e, load(values + i)));
            } else {
                const Floats f = select(common, load(values + i), zero);
                mass_part += f;
                loss_part = fma(f, select(common, difference, zero), loss_part);
            }
        }
        mass.add(mass_part);
        loss.add(loss_part);
        teacher_loss.add(teacher_part);
    }
    if (mixed) {
        const double unit = student.inverse();
        return {loss.total() * unit + teacher_loss.total() * teacher.inverse(), mass.total() * unit};
    }
    if (reverse) {
        const double unit = student.inverse();
        const double total = (loss.total() - mass.total() * lost) * unit;
        return {total, total + mass.total() * unit};
    }
    const double unit = teacher.inverse();
    return {(loss.total() + mass.total() * lost) * unit, -mass.total() * unit};
}

// out[i] = x[index[i]] * factor, with exp(x) for x where `exp` is given.
void pick(const float* x, const int32_t* index, int64_t size, const Exponential* exp, double factor, float* out) {
    const Floats scale = broadcast(static_cast<float>(factor));
    for (int64_t i = 0; i < size; i += lanes) {
        const Floats value = gather(x, index + i);
        store(out + i, (exp == nullptr ? value : (*exp)(value)) * scale);
    }
}

void multiply(float* x, int64_t size, double factor) {
    const Floats scale = broadcast(static_cast<float>(factor));
    for (int64_t i = 0; i < size; i += lanes) store(x + i, load(x + i) * scale);
}

SortedSide sorted_side(const float* values, int64_t size, char*& at) {
    SortedSide side;
    side.values = values;
    side.size = size;
    side.bin = take<int32_t>(at, padded(size));
    side.sorted = take<uint64_t>(at, size);
    side.spare = take<uint64_t>(at, size);
    return side;
}

template <typename T>
Steps<T> take_steps(char*& at, int64_t size) {
    const int64_t room = padded(smaller(size, value_counts) + 1);
    return {take<T>(at, room), take<float>(at, room), take<float>(at, room), take<int32_t>(at, room), 0};
}

// A chunk of one row of 16 bits on each side, without pairs. False, and nothing is done, if there is a logit that is no
// number or infinite.
template <typename S, typename T>
bool unpaired_by_steps(const RankedParams& params, int64_t k, const S* z, const T* y, int32_t* counts, char* at) {
    const int64_t students = params.student.width, teachers = params.teacher.width;
    Steps<T> q = take_steps<T>(at, teachers);
    count_values(y, teachers, counts);
    if (!list_values(counts, q)) return false;
    Steps<S> p = take_steps<S>(at, students);
    count_values(z, students, counts);
    if (!list_values(counts, p)) return false;
    find_probabilities(q, params.lowest, params.temperature);
    find_probabilities(p, params.lowest, params.temperature);
    const int64_t room = padded(p.count + 1);
    auto* sign = take<int32_t>(at, room);
    const auto ranks = static_cast<int32_t>(students > teachers ? students : teachers);
    params.losses[k] = step_l1(p, q, ranks, sign) * params.temperature * params.temperature;
    if (params.grad.data == nullptr) return true;

    auto* slope = take<float>(at, room);
    find_slopes(p, sign, slope);
    DoubleSum total;
    for (int64_t i = 0; i < p.count; i += lanes) {
        const Floats mass = load(p.value + i) * load(p.size + i);
        total.add(select(first(p.count - i), mass * load(slope + i), broadcast(0.0f)));
    }
    const double factor = (params.scale == nullptr ? 1.0 : params.scale[k]) * params.temperature;
    const Floats scale = broadcast(static_cast<float>(factor));
    const Floats mean = broadcast(static_cast<float>(total.total()));
    S* table = take<S>(at, value_counts);
    for (int64_t i = 0; i < p.count; i += lanes) {
        const Floats g = load(p.value + i) * scale * (load(slope + i) - mean);
        alignas(64) S part[lanes];
        store(part, unless_raised(load(p.logit + i), params.lowest, g));
        for (int64_t lane = 0; lane < smaller(lanes, p.count - i); ++lane) table[p.logit[i + lane].bits] = part[lane];
    }
    const int64_t r = params.student_rows.start[k];
    write_looked_up(Target{params.grad.row(r), students, params.grad.width}, z, table);
    return true;
}

// Calls body(static_cast<const T*>(p)) if the elements have 16 bits; else false.
template <typename Body>
bool typed_16_bits(Element type, const void* p, Body body) {
    if (type == Element::bfloat16) return body(static_cast<const BFloat16*>(p));
    return type == Element::float16 && body(static_cast<const Float16*>(p));
}

bool by_steps(const RankedParams& params, int64_t k, int32_t* counts, char* workspace) {
    if (params.student_rows.count[k] != 1 || params.teacher_rows.count[k] != 1) return false;
    return typed_16_bits(params.student.type, params.student.row(params.student_rows.start[k]), [&](const auto* z) {
        return typed_16_bits(params.teacher.type, params.teacher.row(params.teacher_rows.start[k]),
                             [&](const auto* y) { return unpaired_by_steps(params, k, z, y, counts, workspace); });
    });
}

}  // namespace

void ranked_chunk(const RankedParams& params, int64_t k, int32_t* counts, char* workspace) {
    if (params.plan == nullptr && by_steps(params, k, counts, workspace)) return;
    const bool paired = params.plan != nullptr;
    const PairsView plan = paired ? *params.plan : PairsView{};
    const int64_t students = params.student.width, teachers = params.teacher.width;
    const int64_t p_size = !paired ? students : plan.student_rest;
    const int64_t q_size = !paired ? teachers : plan.teacher_rest;
    const int64_t count = params.student_rows.count[k];
    auto* normalisers = take<Normaliser>(workspace, count);
    float* student_total = take<float>(workspace, padded(students));
    float* teacher_total = take<float>(workspace, padded(teachers));
    float* values = take<float>(workspace, padded(teachers) + padded(p_size));
    float* slots = values + padded(teachers);
    float* q = take<float>(workspace, padded(q_size));

    const Side student = read_side(params.student, params.student_rows, k, params, student_total, normalisers,
                                   !paired ? slots : nullptr);
    const Side teacher =
        read_side(params.teacher, params.teacher_rows, k, params, teacher_total, nullptr, !paired ? q : values);
    PairSums pairs{0.0, 0.0};
    if (!paired) {
        multiply(slots, p_size, student.inverse());
        multiply(q, q_size, teacher.inverse());
    } else {
        pairs = over_pairs(plan, student, teacher, params.reverse, params.divergence, values);
        pick(student.logits, plan.student_others, p_size, &student.exp, student.inverse(), slots);
        pick(values, plan.teacher_others, q_size, nullptr, teacher.inverse(), q);
    }
    SortedSide sorted_p = sorted_side(slots, p_size, workspace), sorted_q = sorted_side(q, q_size, workspace);
    const int64_t shorter = smaller(p_size, q_size), longer = p_size + q_size - shorter;
    const SortedL1 others = sorted_l1(sorted_p, sorted_q, !paired ? longer : smaller(params.top_k, shorter), slots);
    params.losses[k] = (pairs.loss + others.loss) * params.temperature * params.temperature;
    if (params.grad.data == nullptr) return;

    // What `values` are in units of: g = value * unit.
    const double unit = !paired                                          ? 1.0
                        : params.reverse || params.divergence.is_mixed() ? student.inverse()
                                                                         : -teacher.inverse();
    if (paired) multiply(slots, p_size, 1 / unit);
    const double factor =
        (params.scale == nullptr ? 1.0 : params.scale[k]) * params.temperature / static_cast<double>(count);
    const Floats value_scale = broadcast(static_cast<float>(factor * unit));
    const float* by_student = !paired ? slots : values;
    const int32_t* slot = plan.slot;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t r = params.student_rows.start[k] + i;
        const Exponential exp = normalisers[i].exp;
        const double softmax = -factor * (pairs.total + others.total) / normalisers[i].total;
        const Floats softmax_scale = broadcast(static_cast<float>(softmax));
        const Floats zero = broadcast(0.0f);
        typed(params.student.type, params.student.row(r), [&](const auto* z) {
            write_row(Target{params.grad.row(r), students, params.grad.width}, z, [&](int64_t j) {
                const Floats x = load(z + j, students - j, zero);
                const Floats g = slot == nullptr ? load(by_student + j) : gather(by_student, slot + j);
                return unless_raised(x, params.lowest, fma(g, value_scale, exp(x) * softmax_scale));
            });
        });
    }
}

}  // namespace xtoken::cpu::XTOKEN_LEVEL
