// The certificate: where an optimal alignment may leave the reference path R, and where it cannot.
#include "core/dp_certificate.h"

#include <algorithm>
#include <cstdlib>
#include <limits>

namespace xtoken::dp {
namespace {

constexpr int32_t kNever = std::numeric_limits<int32_t>::max();

int charge(int32_t span_to_0, int32_t span_to_1, int32_t edges) {
    if (span_to_0 < edges) return 0;
    return span_to_1 < edges ? 1 : 2;
}

}  // namespace

void Certificate::find_regions(const Document& document, const ReferencePath& path, bool all_ties,
                               std::vector<EdgeRange>& regions) {
    document_ = &document;
    path_ = &path;
    place_tokens(document.student(), path.student_at, student_);
    place_tokens(document.teacher(), path.teacher_at, teacher_);
    find_spans(true);
    find_spans(false);

    // A shorter interval brings fewer fragments into reach: certify again what is left, while it shrinks.
    const size_t first = regions.size();
    std::vector<EdgeRange> covered;
    open_.push_back({{0, path.size()}, true});
    while (!open_.empty()) {
        const auto [range, is_whole] = open_.back();
        open_.pop_back();
        covered.clear();
        split(range, all_ties, covered);
        for (const EdgeRange& part : covered) {
            const bool shrinks = 4 * int64_t{part.end - part.first} <= 3 * int64_t{range.end - range.first};
            if (is_whole || shrinks) {
                open_.push_back({part, false});
            } else {
                regions.push_back(part);
            }
        }
    }
    std::sort(regions.begin() + static_cast<std::ptrdiff_t>(first), regions.end(),
              [](const EdgeRange& a, const EdgeRange& b) { return a.first < b.first; });
}

void Certificate::place_tokens(const Sequence& sequence, const std::vector<int32_t>& at, Side& side) {
    side.tokens.resize(sequence.size());
    side.span_to_0.assign(sequence.size(), kNever);
    side.span_to_1.assign(sequence.size(), kNever);
    for (int32_t e = 0; e < path_->size(); ++e) {
        for (int32_t x = at[e]; x < at[e + 1]; ++x) side.tokens[x] = {e, e, sequence.letters[x]};
    }
}

// Spans of the fragments whose single token is the student's (or the teacher's), and the other side a token or a run.
void Certificate::find_spans(bool student_is_single) {
    const Sequence& run = student_is_single ? document_->teacher() : document_->student();
    Side& single_side = student_is_single ? student_ : teacher_;
    Side& run_side = student_is_single ? teacher_ : student_;
    windows_.clear();
    for (const Window& window : run.windows) {
        windows_.push_back(
            {run_side.tokens[window.first].first_edge, run_side.tokens[window.last].last_edge, window.letter});
    }

    const auto is_edge = [&](const Item& single, const Item& item, int length) {
        if (item.first_edge != item.last_edge || item.last_edge != single.last_edge) return false;
        const Move move = path_->moves[item.last_edge];
        const int singles = student_is_single ? move.student : move.teacher;
        const int others = student_is_single ? move.teacher : move.student;
        return move.equal && singles == 1 && others == length;
    };
    const auto length = [&](int32_t w) { return run.windows[w].last - run.windows[w].first + 1; };
    const auto lower = [](int32_t& span, int32_t value) { span = std::min(span, value); };
    const auto span = [](const Item& a, const Item& b) {
        return std::max(a.last_edge, b.last_edge) - std::min(a.first_edge, b.first_edge);
    };
    const std::vector<Item>&singles = single_side.tokens, &others = run_side.tokens;

    for_nearest(
        others, singles, [&](int32_t q, int32_t t) { return is_edge(singles[t], others[q], 1); },
        [&](int32_t q, int32_t t) { lower(run_side.span_to_0[q], span(others[q], singles[t])); });
    for_nearest(
        windows_, singles, [&](int32_t q, int32_t t) { return is_edge(singles[t], windows_[q], length(q)); },
        [&](int32_t q, int32_t t) {
            const int32_t value = span(windows_[q], singles[t]);
            for (int32_t x = run.windows[q].first; x <= run.windows[q].last; ++x) lower(run_side.span_to_0[x], value);
        });
    // Windows of one letter may be nested (empty tokens), so the nearest by its last edge need not have the smallest
    // span: the distance to its last edge alone, which no farther window undercuts, is a bound from below.
    for_nearest(
        singles, windows_, [&](int32_t q, int32_t t) { return is_edge(singles[q], windows_[t], length(t)); },
        [&](int32_t q, int32_t t) {
            lower(single_side.span_to_1[q], std::abs(singles[q].last_edge - windows_[t].last_edge));
        });
}

// The parts of `range` that some suspicious interval covers, (p, r) being suspicious if R costs more there than the
// charges: G[r] > G[p] for the running sum G of cost - charges. Ties count too if all optimal alignments are wanted.
void Certificate::split(EdgeRange range, bool all_ties, std::vector<EdgeRange>& covered) {
    const int32_t edges = range.end - range.first;
    const auto charges = [&](const Side& side, const std::vector<int32_t>& at, int32_t e) {
        int sum = 0;
        for (int32_t x = at[e]; x < at[e + 1]; ++x) sum += charge(side.span_to_0[x], side.span_to_1[x], edges);
        return sum;
    };
    gain_.resize(edges + 1);
    highest_.resize(edges + 1);
    gain_[0] = 0;
    for (int32_t x = 0; x < edges; ++x) {
        const int32_t e = range.first + x;
        gain_[x + 1] = gain_[x] + path_->moves[e].cost() - charges(student_, path_->student_at, e) -
                       charges(teacher_, path_->teacher_at, e);
    }
    highest_[edges] = gain_[edges];
    for (int32_t x = edges - 1; x > 0; --x) highest_[x] = std::max(highest_[x + 1], gain_[x]);

    int64_t lowest = gain_[0];
    for (int32_t x = 0; x < edges;) {
        int cost = 0;
        bool has_gap = false;
        const int32_t start = x;
        for (; x < edges; ++x) {
            lowest = std::min(lowest, gain_[x]);
            if (all_ties ? highest_[x + 1] < lowest : highest_[x + 1] <= lowest) break;
            const Move move = path_->moves[range.first + x];
            cost = std::min(cost + move.cost(), 4);
            has_gap |= move.is_gap();
        }
        const bool four_rule = !has_gap && !document_->has_empty_token() && (all_ties ? cost < 4 : cost <= 4);
        if (x > start && !four_rule) covered.push_back({range.first + start, range.first + x});
        if (x < edges) ++x;
    }
}

// For each query, the nearest target of the same letter at or before its last edge, and the nearest one after it.
// Both lists are ordered by last edge. `own(q, t)` marks the pair that is R's own edge.
template <typename Own, typename Use>
void Certificate::for_nearest(const std::vector<Item>& queries, const std::vector<Item>& targets, Own own, Use use) {
    const int32_t num_queries = static_cast<int32_t>(queries.size()), num_targets = static_cast<int32_t>(targets.size());
    previous_.resize(targets.size());
    nearest_.assign(document_->num_letters(), -1);
    int32_t t = 0;
    for (int32_t q = 0; q < num_queries; ++q) {
        for (; t < num_targets && targets[t].last_edge <= queries[q].last_edge; ++t) {
            previous_[t] = nearest_[targets[t].letter];
            nearest_[targets[t].letter] = t;
        }
        int32_t found = nearest_[queries[q].letter];
        if (found >= 0 && own(q, found)) found = previous_[found];
        if (found >= 0) use(q, found);
    }
    nearest_.assign(document_->num_letters(), -1);
    t = num_targets - 1;
    for (int32_t q = num_queries - 1; q >= 0; --q) {
        for (; t >= 0 && targets[t].last_edge > queries[q].last_edge; --t) nearest_[targets[t].letter] = t;
        const int32_t found = nearest_[queries[q].letter];
        if (found >= 0) use(q, found);
    }
}

}  // namespace xtoken::dp
