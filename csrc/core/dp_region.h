// The table over one rectangle, pruned to the cells that a good enough path can visit.
//
// It stores W(i,j) = 2 (i + j) - cost(i,j), which is not negative and grows along rows and columns:
//
//     W(i,j) = max of W(i-1,j), W(i,j-1), W(i-1,j-1) + 4 [s_i = t_j],
//                     W(i-1,j-k) + 2k + 1 and W(i-k,j-1) + 2k + 1 where there is a combination.
//
// Everything but W(i,j-1) comes from earlier rows: a row is elementwise maxima, then a running maximum. Any
// value of an earlier row in the same column can be reached by a path (with gaps), so a row may read
// whatever is there outside the pruned range: it is a lower bound, and exact on every optimal path.
//
// Pruning: a path through (i,j) costs at least cost(i,j) + h(i,j), with h from RemainingCost. Cells above an
// assumed bound are pruned; if the last cell is within the bound, no optimal path lost a cell. Otherwise
// the bound grows.
//
// Rows are kept for the traceback. When memory is short, only checkpoints are kept, the last kMaxRun rows of each
// block of rows, from which the next block is recomputed when the traceback enters it: O(sqrt(rows) * columns)
// memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/align_dp.h"
#include "core/dp_combinations.h"
#include "core/dp_move.h"
#include "core/dp_remaining_cost.h"

namespace xtoken::dp {

class RegionSolver {
  public:
    // Appends the moves of the best alignment of `rect`, whose cost is at most `upper_bound`. Returns false,
    // with nothing appended, if that takes more than `max_cells`.
    bool solve(const Document& document, const Rect& rect, int64_t upper_bound, int64_t max_cells,
               const DpLimits& limits, std::vector<Move>& moves);
    int64_t cells() const { return cells_; }  // in the last call

    // Frees storage beyond `bytes`.
    void trim(size_t bytes);

  private:
    struct Row {
        int32_t first, last;  // columns kept; none if last < first
        size_t offset;        // of column `first` in values_
        int32_t size() const { return std::max(0, last - first + 1); }
    };

    enum class Fill { reached, pruned_away, out_of_cells };
    Fill fill(double bound, bool prune, int64_t max_cells);
    Row reachable(int32_t i) const;
    void clear_ring();
    void compute_row(int32_t i, int32_t first, int32_t last);
    void prune_row(int32_t i, double bound);
    void store_row(int32_t i);
    void keep_row(int32_t i);
    void drop_rows(int32_t end);
    void recompute_block(int32_t i, int32_t j);
    void walk_back(std::vector<Move>& moves);

    bool is_checkpoint(int32_t i) const { return i % block_rows_ >= block_rows_ - kMaxRun; }
    int32_t* ring_row(int32_t i) { return ring_.data() + (i % (kMaxRun + 1)) * ring_stride_ + kMaxRun; }
    int32_t value(int32_t i, int32_t j) const;
    double least_cost_through(int32_t i, int32_t j) { return 2.0 * (i + j) - ring_row(i)[j] + remaining_(i, j); }

    const Document* document_ = nullptr;
    Rect rect_{};
    RemainingCost remaining_;
    int64_t cells_ = 0;
    int64_t row_bytes_ = 0;

    std::vector<int32_t> ring_;  // the last kMaxRun + 1 rows, full width, behind kMaxRun unreachable columns
    int64_t ring_stride_ = 0;
    std::vector<Row> rows_;
    std::vector<int32_t> values_;  // of all rows, or of the checkpoints and then of one block
    int32_t block_rows_ = 1;
    bool all_kept_ = true;
    size_t checkpoint_end_ = 0;  // of the checkpoints in values_
};

}  // namespace xtoken::dp
