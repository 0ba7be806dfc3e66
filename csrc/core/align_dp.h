// The paper's dynamic program over two token sequences, exact, in near-linear time on real text.
//
// A cheap reference path (dp_reference_path), a certificate that says where an optimal alignment could leave
// it (dp_certificate), and the table only there (dp_region). The result is that of align_table, move by move.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dp_move.h"
#include "core/span.h"
#include "core/token_pair.h"

namespace xtoken {

// What bounds the work. None of it but `cell_budget` and `all_ties` changes the result.
struct DpLimits {
    // Table cells for one document. Beyond that, a region is cut into windows, each solved on its own.
    int64_t cell_budget = 200'000'000;
    int32_t window_edges = 512;  // edges of the reference path in such a window

    // Among equally good alignments, take the one of align_table. If false, any of them.
    bool all_ties = true;

    // A region of up to this many cells gets its whole table filled. Above, only cells that a path of the assumed
    // cost can visit are filled: first `first_slack` above the lower bound, and `slack_growth` times more after each
    // failure, until the cells of one failure exceed 1 / `plain_share` of the table.
    int64_t plain_cells = 4096;
    int32_t first_slack = 32;
    int32_t slack_growth = 4;
    int32_t plain_share = 8;

    // Bytes of rows kept for the traceback. Above, all but a few are dropped and recomputed.
    int64_t row_bytes = 32 << 20;
};

struct DpOutcome {
    bool optimal = true;  // false if the cell budget ran out; the chunks are valid all the same
    int64_t cost = 0;     // of the returned path, in units of 1.5: score = 1.5 * (n + m - cost)
    int64_t cells = 0;    // table cells computed
};

// Aligns symbols student[0, n) with teacher[0, m) of `pair` and appends the moves in order.
DpOutcome align_dp(const TokenPair& pair, const int32_t* student, int32_t n, const int32_t* teacher, int32_t m,
                   const DpLimits& limits, std::vector<dp::Move>& moves);

// The same, but appends the chunks (matches and combinations, not gaps and mismatches). Positions are
// relative to the arguments.
DpOutcome align_dp(const TokenPair& pair, const int32_t* student, int32_t n, const int32_t* teacher, int32_t m,
                   const DpLimits& limits, std::vector<Span>& chunks);
DpOutcome align_dp(const TokenPair& pair, const int32_t* student, int32_t n, const int32_t* teacher, int32_t m,
                   int64_t cell_budget, std::vector<Span>& chunks);

}  // namespace xtoken
