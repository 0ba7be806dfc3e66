// The certificate: where an optimal alignment may leave the reference path R, and where it cannot.
#include "core/dp_certificate.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace xtoken::dp {
namespace {

constexpr int32_t kNever = std::numeric_limits<int32_t>::max();

}  // namespace

void Certificate::find_regions(const Document& document, const ReferencePath& path, bool all_ties,
                               std::vector<EdgeRange>& regions) {
    document_ = &document;
    path_ = &path;
    place_tokens(path.student_at, student_);
    place_tokens(path.teacher_at, teacher_);
    find_spans(true);
    find_spans(false);

    // A shorter interval brings fewer fragments into reach: certify again what is left, while it shrinks.
    regions.clear();
    std::vector<std::pair<EdgeRange, bool>> open = {{{0, path.size()}, true}};  // second: is it the whole path?
    std::vector<EdgeRange> covered;
    while (!open.empty()) {
        const auto [range, is_whole] = open.back();
        open.pop_back();
        covered.clear();
        split(range, all_ties, covered);
        for (const EdgeRange& part : covered) {
            const bool shrinks = 4 * int64_t{part.end - part.first} <= 3 * int64_t{range.end - range.first};
            if (is_whole || shrinks) {
                open.push_back({part, false});
            } else {
                regions.push_back(part);
            }
        }
    }
    std::sort(regions.begin(), regions.end(), [](const EdgeRange& a, const EdgeRange& b) { return a.first < b.first; });
}

void Certificate::place_tokens(const std::vector<int32_t>& at, Side& side) const {
    side.edge.resize(at.back());
    side.span.assign(at.back(), kNever);
    for (int32_t e = 0; e < path_->size(); ++e) {
        for (int32_t x = at[e]; x < at[e + 1]; ++x) side.edge[x] = e;
    }
}

// Pairs every run (a token or a window) of one side with the nearest equal token of the other, before and after
// it.
void Certificate::find_spans(bool student_is_single) {
    const Sequence& single = student_is_single ? document_->student() : document_->teacher();
    const Sequence& other = student_is_single ? document_->teacher() : document_->student();
    const Side& single_side = student_is_single ? student_ : teacher_;
    Side& run_side = student_is_single ? teacher_ : student_;

    runs_.clear();
    auto window = other.windows.begin();
    for (int32_t x = 0; x < other.size(); ++x) {
        runs_.push_back({x, x, other.letters[x]});
        for (; window != other.windows.end() && window->last == x; ++window) runs_.push_back(*window);
    }

    const auto is_edge_of_path = [&](const Window& run, int32_t token) {
        const int32_t e = single_side.edge[token];
        if (run_side.edge[run.first] != e || run_side.edge[run.last] != e) return false;
        const Move move = path_->moves[e];
        return move.equal && (student_is_single ? move.student : move.teacher) == 1 &&
               (student_is_single ? move.teacher : move.student) == run.last - run.first + 1;
    };
    const auto pair_up = [&](const Window& run, int32_t token) {
        const int32_t e = single_side.edge[token];
        const int32_t span = std::max(run_side.edge[run.last], e) - std::min(run_side.edge[run.first], e);
        for (int32_t x = run.first; x <= run.last; ++x) run_side.span[x] = std::min(run_side.span[x], span);
    };

    previous_.resize(single.size());
    nearest_.assign(document_->num_letters(), -1);
    int32_t token = 0;
    for (const Window& run : runs_) {
        for (; token < single.size() && single_side.edge[token] <= run_side.edge[run.last]; ++token) {
            previous_[token] = std::exchange(nearest_[single.letters[token]], token);
        }
        int32_t found = nearest_[run.letter];
        if (found >= 0 && is_edge_of_path(run, found)) found = previous_[found];
        if (found >= 0) pair_up(run, found);
    }
    nearest_.assign(document_->num_letters(), -1);
    token = single.size() - 1;
    for (auto run = runs_.rbegin(); run != runs_.rend(); ++run) {
        for (; token >= 0 && single_side.edge[token] > run_side.edge[run->last]; --token) {
            nearest_[single.letters[token]] = token;
        }
        if (nearest_[run->letter] >= 0) pair_up(*run, nearest_[run->letter]);
    }
}

// Of the tokens of an edge, in an interval of that many edges.
int Certificate::charges(int32_t edge, int32_t edges_in_reach) const {
    int sum = 0;
    const auto add = [&](const Sequence& sequence, const Sequence& other, const Side& side,
                         const std::vector<int32_t>& at) {
        for (int32_t x = at[edge]; x < at[edge + 1]; ++x) {
            if (side.span[x] >= edges_in_reach) sum += other.run_lengths[sequence.letters[x]] ? 1 : 2;
        }
    };
    add(document_->student(), document_->teacher(), student_, path_->student_at);
    add(document_->teacher(), document_->student(), teacher_, path_->teacher_at);
    return sum;
}

// The parts of `range` that some suspicious interval covers, (p, r) being suspicious if R costs more there
// than the charges: G[r] > G[p] for the running sum G of cost - charges. Ties count too if all optimal
// alignments are wanted.
void Certificate::split(EdgeRange range, bool all_ties, std::vector<EdgeRange>& covered) {
    const int32_t edges = range.end - range.first;
    gain_.resize(edges + 1);
    highest_.resize(edges + 1);
    gain_[0] = 0;
    for (int32_t x = 0; x < edges; ++x) {
        const int32_t e = range.first + x;
        gain_[x + 1] = gain_[x] + path_->moves[e].cost() - charges(e, edges);
    }
    highest_[edges] = gain_[edges];
    for (int32_t x = edges - 1; x > 0; --x) highest_[x] = std::max(highest_[x + 1], gain_[x]);

    int64_t lowest = gain_[0];
    for (int32_t x = 0; x < edges;) {
        int64_t cost = 0;
        bool has_gap = false;
        const int32_t start = x;
        for (; x < edges; ++x) {
            lowest = std::min(lowest, gain_[x]);
            if (all_ties ? highest_[x + 1] < lowest : highest_[x + 1] <= lowest) break;
            const Move move = path_->moves[range.first + x];
            cost += move.cost();
            has_gap |= move.is_gap();
        }
        const bool four_rule = !has_gap && !document_->has_empty_token() && (all_ties ? cost < 4 : cost <= 4);
        if (x > start && !four_rule) covered.push_back({range.first + start, range.first + x});
        if (x < edges) ++x;
    }
}

}  // namespace xtoken::dp
