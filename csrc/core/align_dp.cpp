// The paper's dynamic program over two token sequences, exact, in near-linear time on real text.
#include "core/align_dp.h"

#include <algorithm>

#include "core/dp_certificate.h"
#include "core/dp_combinations.h"
#include "core/dp_reference_path.h"
#include "core/dp_region.h"
#include "core/error.h"

namespace xtoken {
namespace {

using dp::EdgeRange;
using dp::Move;

constexpr int64_t kMaxTokens = int64_t{1} << 28;  // so that table values fit 32 bits
constexpr size_t kKeptBytes = size_t{4} << 20;    // of table rows, from one document to the next
constexpr int64_t kUnlimited = int64_t{1} << 62;

void check(const DpLimits& limits) {
    const auto at_least = [](const char* name, int64_t least, int64_t value) {
        if (value < least) value_error("limits.", name, ": expected at least ", least, ", got ", value);
    };
    at_least("cell_budget", 0, limits.cell_budget);
    at_least("window_edges", 1, limits.window_edges);
    at_least("plain_cells", 0, limits.plain_cells);
    at_least("first_slack", 1, limits.first_slack);
    at_least("slack_growth", 2, limits.slack_growth);
    at_least("plain_share", 1, limits.plain_share);
    at_least("row_bytes", 0, limits.row_bytes);
}

// One document at a time; everything keeps its storage for the next one.
class DocumentAligner {
  public:
    DpOutcome align(const TokenPair& pair, const int32_t* student, int32_t n, const int32_t* teacher, int32_t m,
                    const DpLimits& limits, std::vector<Move>& moves) {
        document_.assign(pair, student, n, teacher, m);
        path_builder_.build(document_, path_);
        certificate_.find_regions(document_, path_, limits.all_ties, regions_);

        outcome_ = {};
        const size_t start = moves.size();
        int32_t done = 0;
        for (const EdgeRange& region : regions_) {
            follow_path(done, region.first, moves);
            solve(region, limits, moves);
            done = region.end;
        }
        follow_path(done, path_.size(), moves);
        for (size_t x = start; x < moves.size(); ++x) outcome_.cost += moves[x].cost();
        solver_.trim(kKeptBytes);
        return outcome_;
    }

  private:
    void follow_path(int32_t first, int32_t end, std::vector<Move>& moves) const {
        moves.insert(moves.end(), path_.moves.begin() + first, path_.moves.begin() + end);
    }

    bool solve_within(const EdgeRange& range, int64_t max_cells, const DpLimits& limits, std::vector<Move>& moves) {
        int64_t path_cost = 0;
        for (int32_t e = range.first; e < range.end; ++e) path_cost += path_.moves[e].cost();
        const bool solved =
            solver_.solve(document_, path_.rect(range.first, range.end), path_cost, max_cells, limits, moves);
        outcome_.cells += solver_.cells();
        return solved;
    }

    // Exactly, or in windows if the budget of cells runs out. Windows do not count against it: their cost is linear.
    void solve(const EdgeRange& region, const DpLimits& limits, std::vector<Move>& moves) {
        if (region.end - region.first > limits.window_edges) {
            if (solve_within(region, limits.cell_budget - outcome_.cells, limits, moves)) return;
            outcome_.optimal = false;
        }
        for (EdgeRange window = region; window.first < region.end; window.first = window.end) {
            window.end = window.first + std::min(region.end - window.first, limits.window_edges);
            solve_within(window, kUnlimited, limits, moves);
        }
    }

    dp::Document document_;
    dp::ReferencePathBuilder path_builder_;
    dp::ReferencePath path_;
    dp::Certificate certificate_;
    std::vector<EdgeRange> regions_;
    dp::RegionSolver solver_;
    DpOutcome outcome_;
};

}  // namespace

DpOutcome align_dp(const TokenPair& pair, const int32_t* student, int32_t n, const int32_t* teacher, int32_t m,
                   const DpLimits& limits, std::vector<Move>& moves) {
    if (int64_t{n} + m > kMaxTokens) {
        value_error("tokens: at most ", kMaxTokens, " on both sides together, got ", int64_t{n} + m);
    }
    check(limits);
    thread_local DocumentAligner aligner;
    return aligner.align(pair, student, n, teacher, m, limits, moves);
}

DpOutcome align_dp(const TokenPair& pair, const int32_t* student, int32_t n, const int32_t* teacher, int32_t m,
                   const DpLimits& limits, std::vector<Span>& chunks) {
    thread_local std::vector<Move> moves;
    moves.clear();
    const DpOutcome outcome = align_dp(pair, student, n, teacher, m, limits, moves);
    int32_t i = 0, j = 0;
    for (const Move& move : moves) {
        if (move.equal) chunks.push_back({i, i + move.student, j, j + move.teacher});
        i += move.student;
        j += move.teacher;
    }
    return outcome;
}

DpOutcome align_dp(const TokenPair& pair, const int32_t* student, int32_t n, const int32_t* teacher, int32_t m,
                   int64_t cell_budget, std::vector<Span>& chunks) {
    DpLimits limits;
    limits.cell_budget = cell_budget;
    return align_dp(pair, student, n, teacher, m, limits, chunks);
}

}  // namespace xtoken
