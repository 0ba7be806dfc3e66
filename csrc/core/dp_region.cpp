// The table over one rectangle, pruned to the cells that a good enough path can visit.
#include "core/dp_region.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/dp_rows.h"

namespace xtoken::dp {
namespace {

constexpr int32_t kUnreachable = std::numeric_limits<int32_t>::min() / 2;
constexpr int32_t kTile = 512;  // columns worked on at a time, so that they stay in the first cache

}  // namespace

void RemainingCost::assign(const Document& document, const Rect& rect) {
    constexpr uint8_t kInStudent = 1, kInTeacher = 2, kSpelledByStudent = 4, kSpelledByTeacher = 8;
    letter_flags_.assign(document.num_letters(), 0);
    const int32_t* s = document.student().letters.data() + rect.student_start;
    const int32_t* t = document.teacher().letters.data() + rect.teacher_start;
    for (int32_t x = 0; x < rect.rows(); ++x) letter_flags_[s[x]] |= kInStudent;
    for (int32_t x = 0; x < rect.cols(); ++x) letter_flags_[t[x]] |= kInTeacher;

    const auto charge_side = [&](const Sequence& side, int32_t start, int32_t count, uint8_t in_other,
                                 uint8_t spelled_by_side, std::vector<Rest>& rest) {
        rest.assign(count + 1, {2, 0});
        for (int32_t x = 0; x < count; ++x) {
            if (letter_flags_[side.letters[start + x]] & in_other) rest[x].charge = 0;
        }
        auto window = std::lower_bound(side.windows.begin(), side.windows.end(), start,
                                       [](const Window& w, int32_t token) { return w.last < token; });
        for (; window != side.windows.end() && window->last < start + count; ++window) {
            if (window->first < start || !(letter_flags_[window->letter] & in_other)) continue;
            letter_flags_[window->letter] |= spelled_by_side;
            for (int32_t x = window->first; x <= window->last; ++x) rest[x - start].charge = 0;
        }
    };
    charge_side(document.student(), rect.student_start, rect.rows(), kInTeacher, kSpelledByStudent, student_);
    charge_side(document.teacher(), rect.teacher_start, rect.cols(), kInStudent, kSpelledByTeacher, teacher_);

    gap_excess_ = 2;
    const auto sum_up = [&](const int32_t* letters, int32_t count, uint8_t spelled_by_other, std::vector<Rest>& rest) {
        int64_t longest = 1;
        rest[count] = {0, 0};
        for (int32_t x = count - 1; x >= 0; --x) {
            int32_t charge = rest[x].charge;
            if (charge == 2 && (letter_flags_[letters[x]] & spelled_by_other)) charge = 1;
            if (charge == 1) gap_excess_ = 1;
            const int64_t length = charge < 2 ? document.length(letters[x]) : 0;
            longest = std::max(longest, length);
            rest[x] = {rest[x + 1].charge + charge, rest[x + 1].length + length};
        }
        return longest;
    };
    longest_student_ = sum_up(s, rect.rows(), kSpelledByTeacher, student_);
    longest_teacher_ = sum_up(t, rect.cols(), kSpelledByStudent, teacher_);
}

bool RegionSolver::solve(const Document& document, const Rect& rect, int64_t upper_bound, int64_t max_cells,
                         const DpLimits& limits, std::vector<Move>& moves) {
    document_ = &document;
    limits_ = &limits;
    rect_ = rect;
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
        const int64_t least = remaining_(0, 0);
        int64_t slack = limits.first_slack, used = 0;
        do {
            const int64_t before = cells_;
            result = fill(std::min(upper_bound, least + slack), true, max_cells);
            used = cells_ - before;
            slack *= limits.slack_growth;
        } while (result == Fill::pruned_away && used * limits.plain_share <= table);
    }
    if (result == Fill::pruned_away) {
        if (cells_ + table > max_cells) return false;
        result = fill(0, false, max_cells);
    }
    if (result == Fill::out_of_cells) return false;
    walk_back(moves);
    return true;
}

RegionSolver::Fill RegionSolver::fill(int64_t bound, bool prune, int64_t max_cells) {
    const int32_t n = rect_.rows(), m = rect_.cols();
    block_rows_ = std::max(kMaxRun, static_cast<int32_t>(2 * std::sqrt(n + 1.0)));
    const int32_t num_blocks = n / block_rows_ + 1;
    blocks_.resize(std::max<size_t>(blocks_.size(), num_blocks));
    for (int32_t block = 0; block < num_blocks; ++block) blocks_[block].clear();
    kept_ = 0;
    first_whole_ = 0;
    rows_.resize(n + 1);
    clear_ring();

    for (int32_t i = 0; i <= n; ++i) {
        int32_t first = 0, last = i == 0 ? 0 : m;
        if (prune && i > 0) {
            // A cell can only be reached from the kMaxRun rows above, or by gaps from its left.
            first = m + 1;
            last = -1;
            for (int32_t above = std::max(0, i - kMaxRun); above < i; ++above) {
                if (rows_[above].last < rows_[above].first) continue;
                first = std::min(first, rows_[above].first);
                last = std::max(last, std::min(m, rows_[above].last + kMaxRun));
            }
            if (last < first) return Fill::pruned_away;
        }
        if (i > 0) compute_row(i, first, last);
        if (!prune) last = m;
        if (prune) {
            int32_t* row = ring_row(i);
            for (; last < m && lower_bound(i, last) <= bound; ++last) row[last + 1] = row[last];
            while (first <= last && lower_bound(i, last) > bound) --last;
            while (first <= last && lower_bound(i, first) > bound) ++first;
        }
        rows_[i].first = first;
        rows_[i].last = last;
        keep_row(i);
        if (cells_ > max_cells) return Fill::out_of_cells;
    }
    return rows_[n].last == m ? Fill::reached : Fill::pruned_away;
}

void RegionSolver::clear_ring() {
    ring_stride_ = int64_t{rect_.cols()} + 1 + kMaxRun;
    ring_.assign((kMaxRun + 1) * ring_stride_, 0);
    for (int32_t x = 0; x <= kMaxRun; ++x) std::fill_n(ring_row(x) - kMaxRun, kMaxRun, kUnreachable);
}

// Row i of the ring in columns [first, last], from the rows above it.
void RegionSolver::compute_row(int32_t i, int32_t first, int32_t last) {
    const Sequence &student = document_->student(), &teacher = document_->teacher();
    // Column j of the rectangle is behind teacher token j - 1.
    const int32_t* letters = teacher.letters.data() + rect_.teacher_start - 1;
    const int32_t s = rect_.student_start + i - 1;
    const int32_t letter = student.letters[s];
    int32_t* row = ring_row(i);
    const int32_t* above = ring_row(i - 1);
    cells_ += last - first + 1;

    int32_t running = 0;
    if (first == 0) {
        row[0] = 0;
        first = 1;
    }
    for (int32_t j = first; j <= last; j += kTile) {
        const int32_t count = std::min(kTile, last - j + 1);
        raise_row(row + j, above + j, above + j - 1, letters + j, letter, 4, count);
        for (int k = 2; k <= kMaxRun; ++k) {
            if (teacher.run_lengths[letter] & 1 << k) {
                const int32_t* spelled = teacher.spelled[k].data() + rect_.teacher_start - 1;
                raise_row(row + j, row + j, above + j - k, spelled + j, letter, 2 * k + 1, count);
            }
            if (k <= i && student.spelled[k][s] >= 0) {
                raise_row(row + j, row + j, ring_row(i - k) + j - 1, letters + j, student.spelled[k][s], 2 * k + 1,
                          count);
            }
        }
        running = running_max(row + j, running, count);
    }
}

void RegionSolver::keep_row(int32_t i) {
    const int32_t block = i / block_rows_;
    std::vector<int32_t>& values = blocks_[block];
    Row& row = rows_[i];
    row.offset = values.size();
    if (row.last >= row.first) {
        const int32_t* from = ring_row(i);
        values.insert(values.end(), from + row.first, from + row.last + 1);
        kept_ += row.last - row.first + 1;
    }
    if (kept_ * static_cast<int64_t>(sizeof(int32_t)) > limits_->row_bytes) drop_old_blocks(block);
}

// Cuts the whole blocks before `current` down to their last kMaxRun rows.
void RegionSolver::drop_old_blocks(int32_t current) {
    for (; first_whole_ < current; ++first_whole_) {
        std::vector<int32_t>& values = blocks_[first_whole_];
        const int32_t end = (first_whole_ + 1) * block_rows_;
        const size_t dropped = rows_[end - kMaxRun].offset;
        for (int32_t i = end - kMaxRun; i < end; ++i) rows_[i].offset -= dropped;
        kept_ -= static_cast<int64_t>(dropped);
        values = std::vector<int32_t>(values.begin() + static_cast<std::ptrdiff_t>(dropped), values.end());
    }
}

void RegionSolver::recompute_block(int32_t block) {
    const int32_t start = block * block_rows_;
    clear_ring();
    for (int32_t i = std::max(0, start - kMaxRun); i < start; ++i) {
        const Row& row = rows_[i];
        const int32_t* from = blocks_[block - 1].data() + row.offset;
        if (row.last >= row.first) std::copy(from, from + (row.last - row.first + 1), ring_row(i) + row.first);
    }
    blocks_[block].clear();
    for (int32_t i = start; i < start + block_rows_; ++i) {
        Row& row = rows_[i];
        if (i > 0 && row.last >= row.first) compute_row(i, row.first, row.last);
        keep_row(i);
    }
}

// W, or something that no sum reaches where the cell was pruned.
int64_t RegionSolver::value(int32_t i, int32_t j) const {
    const Row& row = rows_[i];
    if (j < row.first || j > row.last) return kUnreachable;
    return blocks_[i / block_rows_][row.offset + (j - row.first)];
}

// A predecessor is on an optimal path exactly if its value and the gain add up; the first in the published order wins.
void RegionSolver::walk_back(std::vector<Move>& moves) {
    const Sequence &student = document_->student(), &teacher = document_->teacher();
    const auto preceding_move = [&](int32_t i, int32_t j) {
        const int64_t here = value(i, j);
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
    int32_t block = rect_.rows() / block_rows_;
    for (int32_t i = rect_.rows(), j = rect_.cols(); i > 0 || j > 0;) {
        if (i / block_rows_ < block && first_whole_ > 0) std::vector<int32_t>().swap(blocks_[block]);
        block = i / block_rows_;
        if (block < first_whole_) {
            recompute_block(block);
            first_whole_ = block;
        }
        const Move move = preceding_move(i, j);
        moves.push_back(move);
        i -= move.student;
        j -= move.teacher;
    }
    std::reverse(moves.begin() + start, moves.end());
}

void RegionSolver::trim(size_t bytes) {
    size_t held = ring_.capacity();
    for (const auto& block : blocks_) held += block.capacity();
    if (held * sizeof(int32_t) <= bytes) return;
    std::vector<int32_t>().swap(ring_);
    std::vector<std::vector<int32_t>>().swap(blocks_);
}

}  // namespace xtoken::dp
