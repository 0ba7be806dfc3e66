// Layouts of W, restricted to a set of teacher columns, for the P-KL kernel.
//
// Most entries are pairs: alone in their row and in their column, and of weight 1. There x = W^T e is an element of e
// and h = W u one of u, in the order of the rows: all that a pair needs from elsewhere is the teacher's probability of
// its column, and where the ids of 16 rows follow each other, so do their columns'. The other columns, and the other
// rows, are weighted sums of a few elements, 16 at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace xtoken::cpu {

// Weighted sums, 16 side by side: entry i of lane l of slice k is at 16 * (start[k] + i) + l. Sorted by length, filled
// up with entries of weight 0 that name a zero slot.
struct SumsView {
    int64_t slices;
    const int64_t* start;    // [slices + 1]
    const int32_t* index;    // [16 * start[slices]]
    const float* weight;     // as index
    const int32_t* owner;    // [16 * slices] the column or row that it is the sum of; behind the last, a zero slot
    const float* remainder;  // [16 * slices] 1 - (sum of the weights); 0 behind the last
};

// What the kernels see of a plan. "Rows" are student tokens: all of them, or with a column subset the active ones,
// which have an entry in it.
struct PlanView {
    int64_t student_size, teacher_size;
    int64_t rows, columns;        // compact counts
    const uint16_t* active_bits;  // [ceil(student_size / 16)] one bit a student id; null: all are active
    const int32_t* chosen;        // [padded columns] teacher ids, ascending; null: all
    // The column of each row that is one of a pair; else the slot behind `padded columns`, which is zero.
    const int32_t* partner;      // [padded rows]
    const int32_t* partner_run;  // [padded rows / 16] the first, if the others that are paired follow in order; else -1
    const uint16_t* paired_bits;  // [padded rows / 16] one bit a row
    const uint16_t* empty_bits;   // [padded columns / 16] one bit a column without entries
    // The other columns' x, from e (padded rows, a zero slot), and the other rows' h. The latter come from (u of the
    // pairs in their rows' places, 16 zeros, u of the other columns in the order of their sums).
    SumsView column_sums, row_sums;
    const float* row_weight;   // [padded rows] sum of the row's weights in the columns
    const int32_t* deficient;  // [num_deficient] compact rows whose weights do not sum to 1
    int64_t num_deficient;
    const int32_t* empty;  // [num_empty] compact rows without entries; with a subset there are none
    int64_t num_empty;
    // The entries in the columns, by row, for gradients of W: the compact row, and where the column's u is.
    const int32_t* entry_row;
    const int32_t* entry_u;
    int64_t entries;
};

// For each 16 rows the partner of the first, if those of the others that are paired follow in order; else -1.
std::vector<int32_t> find_runs(const std::vector<int32_t>& partners, const std::vector<uint16_t>& paired_bits);

// Where a matrix has entries, in compressed rows and in compressed columns.
class ColumnIndex {
  public:
    ColumnIndex(std::vector<int64_t> row_ptr, std::vector<int32_t> col, int64_t teacher_size);

    int64_t student_size() const { return static_cast<int64_t>(row_ptr_.size()) - 1; }
    int64_t teacher_size() const { return static_cast<int64_t>(col_ptr_.size()) - 1; }
    int64_t entries() const { return static_cast<int64_t>(col_.size()); }

  private:
    friend class Plan;
    std::vector<int64_t> row_ptr_;  // [student_size + 1]
    std::vector<int32_t> col_;      // [entries]
    std::vector<int64_t> col_ptr_;  // [teacher_size + 1]
    std::vector<int32_t> entry_;    // [entries] positions in col_, by column
    std::vector<int32_t> row_;      // [entries] their rows
};

// A layout that depends on where W has entries (and which of them are alone and weigh 1), and the weights in it.
class Plan {
  public:
    // For all columns (`chosen` empty), or for these: ascending, distinct. `weight` [matrix.entries()].
    Plan(const ColumnIndex& matrix, const float* weight, std::vector<int32_t> chosen);
    Plan(Plan&&) = default;

    // The same columns with other weights; shares the layout, if the entries that have to weigh 1 still do.
    Plan reweighted(const ColumnIndex& matrix, const float* weight) const;

    const PlanView& view() const { return view_; }

  private:
    // Of sums, in the order of SumsView; entries are positions in W, -1 where a sum is filled up.
    struct SumsLayout {
        int64_t count = 0;
        std::vector<int64_t> start;
        std::vector<int32_t> index, entry, owner;
    };
    struct Layout {
        std::vector<int32_t> chosen, active, partner, partner_run, empty, entry, entry_row, entry_u;
        std::vector<uint16_t> active_bits, paired_bits, empty_bits;
        std::vector<int32_t> pair;  // entries of pairs: they weigh 1
        SumsLayout column_sums, row_sums;
        int64_t student_size, teacher_size, rows, columns;
    };
    struct Lists;
    struct Sums {
        std::vector<float> weight, remainder;
        SumsView view(const SumsLayout& layout) const;
    };

    Plan(std::shared_ptr<const Layout> layout, const float* weight);
    static std::shared_ptr<const Layout> make_layout(const ColumnIndex& matrix, const float* weight,
                                                     std::vector<int32_t> chosen);
    static SumsLayout make_sums(Lists& lists, int32_t zero_slot, int32_t no_owner);
    static Sums weigh(const SumsLayout& layout, const float* weight);

    std::shared_ptr<const Layout> layout_;
    std::vector<float> row_weight_;
    std::vector<int32_t> deficient_;
    Sums column_sums_, row_sums_;
    PlanView view_;
};

}  // namespace xtoken::cpu
