// The table over one rectangle, pruned to the cells that a good enough path can visit.
#include "core/dp_region.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/dp_rows.h"

namespace xtoken::dp {
namespace {

constexpr int32_t kUnreachable = std::numeric_limits<int32_t>::min() / 2;
constexpr int32_t kTile = 512;  // columns worked on at a time, so that they stay in the L1 cache

}  // namespace

bool RegionSolver::solve(const Document& document, const Rect& rect, int64_t upper_bound, int64_t max_cells,
                         const DpLimits& limits, std::vector<Move>& moves) {
    document_ = &document;
    rect_ = rect;
    row_bytes_ = limits.row_bytes;
    cells_ = 0;
    if (rect.rows() == 0 || rect.cols() == 0) {
        moves.insert(moves.end(), rect.rows(), kStudentGap);
        moves.insert(moves.end(), rect.cols(), kTeacherGap);
        return true;
    }

    const int64_t table = (int64_t{rect.rows()} + 1) * (int64_t{rect.cols()} + 1);
    Fill result = Fill::pruned_away;
    if (table > limits.plain_cells) {
        remaining_.assign(document, rect);
        const double highest = static_cast<double>(upper_bound);
        double slack = limits.first_slack;
        int64_t used = 0;
        do {
            const int64_t before = cells_;
            result = fill(std::min(highest, remaining_(0, 0) + slack), true, max_cells);
            used = cells_ - before;
            slack *= limits.slack_growth;
        } while (result == Fill::pruned_away && used * limits.plain_share <= table);
    }
    if (result == Fill::pruned_away && cells_ + table <= max_cells) result = fill(0, false, max_cells);
    if (result != Fill::reached) return false;
    walk_back(moves);
    return true;
}

RegionSolver::Fill RegionSolver::fill(double bound, bool prune, int64_t max_cells) {
    const int32_t n = rect_.rows(), m = rect_.cols();
    block_rows_ = std::max(kMaxRun, static_cast<int32_t>(2 * std::sqrt(n + 1.0)));
    rows_.resize(n + 1);
    values_.clear();
    all_kept_ = prune || (n + 1.0) * (m + 1.0) * sizeof(int32_t) <= static_cast<double>(row_bytes_);
    clear_ring();

    for (int32_t i = 0; i <= n; ++i) {
        Row& row = rows_[i];
        row = prune ? reachable(i) : Row{0, m, 0};
        if (row.size() == 0) return Fill::pruned_away;
        if (i > 0) compute_row(i, row.first, row.last);
        if (prune) prune_row(i, bound);
        keep_row(i);
        if (cells_ > max_cells) return Fill::out_of_cells;
    }
    checkpoint_end_ = values_.size();
    return rows_[n].last == m ? Fill::reached : Fill::pruned_away;
}

// The columns of row i that can be reached from the kMaxRun rows above.
RegionSolver::Row RegionSolver::reachable(int32_t i) const {
    if (i == 0) return {0, 0, 0};
    Row row{rect_.cols() + 1, -1, 0};
    for (int32_t above = std::max(0, i - kMaxRun); above < i; ++above) {
        if (rows_[above].size() == 0) continue;
        row.first = std::min(row.first, rows_[above].first);
        row.last = std::max(row.last, std::min(rect_.cols(), rows_[above].last + kMaxRun));
    }
    return row;
}

void RegionSolver::clear_ring() {
    ring_stride_ = int64_t{rect_.cols()} + 1 + kMaxRun;
    ring_.assign((kMaxRun + 1) * ring_stride_, 0);
    for (int32_t x = 0; x <= kMaxRun; ++x) std::fill_n(ring_row(x) - kMaxRun, kMaxRun, kUnreachable);
}

// Row i of the ring in columns [first, last], from the rows above it.
void RegionSolver::compute_row(int32_t i, int32_t first, int32_t last) {
    const Sequence &student = document_->student(), &teacher = document_->teacher();
    // Column j of the rectangle comes after teacher token j - 1.
    const int64_t shift = int64_t{rect_.teacher_start} - 1;
    const int32_t s = rect_.student_start + i - 1;
    const int32_t letter = student.letters[s];
    int32_t* row = ring_row(i);
    const int32_t* above = ring_row(i - 1);
    cells_ += last - first + 1;

    if (first == 0) row[first++] = 0;
    int32_t highest = 0;
    for (int32_t j = first; j <= last; j += kTile) {
        const int32_t count = std::min(kTile, last - j + 1);
        const int32_t* letters = teacher.letters.data() + (shift + j);
        raise_row(row + j, above + j, above + j - 1, letters, letter, 4, count);
        for (int k = 2; k <= kMaxRun; ++k) {
            if (teacher.run_lengths[letter] & 1 << k) {
                const int32_t* spelled = teacher.spelled[k].data() + (shift + j);
                raise_row(row + j, row + j, above + j - k, spelled, letter, 2 * k + 1, count);
            }
            const int32_t run = student.spelled[k][s];
            if (k <= i && run >= 0) {
                raise_row(row + j, row + j, ring_row(i - k) + j - 1, letters, run, 2 * k + 1, count);
            }
        }
        highest = running_max(row + j, highest, count);
    }
}

// Narrows row i to the cells within the bound; first widens it to the right, to the cells that gaps alone reach.
void RegionSolver::prune_row(int32_t i, double bound) {
    Row& row = rows_[i];
    int32_t* values = ring_row(i);
    for (; row.last < rect_.cols() && least_cost_through(i, row.last) <= bound; ++row.last) {
        values[row.last + 1] = values[row.last];
    }
    while (row.first <= row.last && least_cost_through(i, row.last) > bound) --row.last;
    while (row.first <= row.last && least_cost_through(i, row.first) > bound) ++row.first;
}

void RegionSolver::store_row(int32_t i) {
    Row& row = rows_[i];
    row.offset = values_.size();
    if (row.size() == 0) return;
    const int32_t* from = ring_row(i) + row.first;
    values_.insert(values_.end(), from, from + row.size());
}

void RegionSolver::keep_row(int32_t i) {
    const size_t bytes = (values_.size() + rows_[i].size()) * sizeof(int32_t);
    if (all_kept_ && bytes > static_cast<size_t>(row_bytes_)) drop_rows(i);
    if (all_kept_ || is_checkpoint(i)) store_row(i);
}

// Drops all rows before `end` except the checkpoints.
void RegionSolver::drop_rows(int32_t end) {
    all_kept_ = false;
    size_t size = 0;
    for (int32_t i = 0; i < end; ++i) {
        Row& row = rows_[i];
        if (!is_checkpoint(i)) continue;
        std::copy_n(values_.data() + row.offset, row.size(), values_.data() + size);
        row.offset = size;
        size += row.size();
    }
    values_.resize(size);
}

// Recomputes the rows of row i's block up to row i, in the columns up to j.
void RegionSolver::recompute_block(int32_t i, int32_t j) {
    const int32_t start = i / block_rows_ * block_rows_;
    values_.resize(checkpoint_end_);
    clear_ring();
    for (int32_t x = std::max(0, start - kMaxRun); x < start; ++x) {
        std::copy_n(values_.data() + rows_[x].offset, rows_[x].size(), ring_row(x) + rows_[x].first);
    }
    size_t size = values_.size();
    for (int32_t x = start; x <= i; ++x) {
        rows_[x].last = std::min(rows_[x].last, j);
        size += rows_[x].size();
    }
    values_.reserve(size);
    for (int32_t x = start; x <= i; ++x) {
        if (x > 0 && rows_[x].size() > 0) compute_row(x, rows_[x].first, rows_[x].last);
        store_row(x);
    }
}

// W, or where the cell was pruned a value that no sum reaches.
int32_t RegionSolver::value(int32_t i, int32_t j) const {
    const Row& row = rows_[i];
    if (j < row.first || j > row.last) return kUnreachable;
    return values_[row.offset + (j - row.first)];
}

// A predecessor is on an optimal path if and only if its value plus the gain is the cell's value; the first in the
// published order wins.
void RegionSolver::walk_back(std::vector<Move>& moves) {
    const Sequence &student = document_->student(), &teacher = document_->teacher();
    const auto preceding_move = [&](int32_t i, int32_t j) {
        const int32_t here = value(i, j);
        const int32_t s = rect_.student_start + i - 1, t = rect_.teacher_start + j - 1;
        if (i > 0 && j > 0) {
            const bool equal = student.letters[s] == teacher.letters[t];
            if (value(i - 1, j - 1) + (equal ? 4 : 0) == here) return equal ? kMatch : kMismatch;
        }
        if (i > 0 && value(i - 1, j) == here) return kStudentGap;
        if (j > 0 && value(i, j - 1) == here) return kTeacherGap;
        for (int k = 2; k <= std::min(j, kMaxRun); ++k) {
            if (teacher.spelled[k][t] == student.letters[s] && value(i - 1, j - k) + 2 * k + 1 == here) {
                return one_to_many(k);
            }
        }
        int k = 2;
        while (student.spelled[k][s] != teacher.letters[t] || value(i - k, j - 1) + 2 * k + 1 != here) ++k;
        return many_to_one(k);
    };

    const auto start = static_cast<std::ptrdiff_t>(moves.size());
    int32_t block = -1;
    for (int32_t i = rect_.rows(), j = rect_.cols(); i > 0 || j > 0;) {
        if (!all_kept_ && i / block_rows_ != block) {
            block = i / block_rows_;
            recompute_block(i, j);
        }
        const Move move = preceding_move(i, j);
        moves.push_back(move);
        i -= move.student;
        j -= move.teacher;
    }
    std::reverse(moves.begin() + start, moves.end());
}

void RegionSolver::trim(size_t bytes) {
    if ((ring_.capacity() + values_.capacity()) * sizeof(int32_t) <= bytes) return;
    std::vector<int32_t>().swap(ring_);
    std::vector<int32_t>().swap(values_);
}

}  // namespace xtoken::dp
