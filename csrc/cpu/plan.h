// Layouts of W, restricted to a set of teacher columns, for the P-KL kernel.
//
// x = W^T e and h = W u are gathers by index alone: where a column is fed by one entry of weight 1 (most are), x[j] is
// an element of e. Sums of several entries, or of one with another weight, are computed first, 16 at a time, and put
// behind e, so the same gather finds them; so does a zero for columns without entries.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace xtoken::cpu {

// Weighted sums, 16 side by side: entry i of lane l of slice k is at 16 * (start[k] + i) + l. Sorted by length, filled
// up with entries of weight 0 that name the zero slot.
struct SumsView {
    int64_t slices;
    const int64_t* start;    // [slices + 1]
    const int32_t* index;    // [16 * start[slices]]
    const float* weight;     // as index
    const float* remainder;  // [16 * slices] 1 - (sum of the weights)
};

// What the kernels see of a plan. "Rows" are student tokens: all of them, or with a column subset the active ones,
// which have an entry in it.
struct PlanView {
    int64_t student_size, teacher_size;
    int64_t rows, columns;        // compact counts
    const uint16_t* active_bits;  // [ceil(student_size / 16)] one bit a student id; null: all are active
    const int32_t* chosen;        // [padded columns] teacher ids, ascending; null: all
    // Where x[j] is in (e, 16 zeros, column sums), and h[i] in (u, 16 zeros, row sums); padded with the zero slot.
    const int32_t* column_source;
    const int32_t* row_source;
    SumsView column_sums, row_sums;
    const float* row_weight;   // [padded rows] sum of the row's weights in the columns
    const int32_t* deficient;  // [num_deficient] compact rows whose weights do not sum to 1
    int64_t num_deficient;
    const int32_t* empty;  // [num_empty] compact rows without entries; with a subset there are none
    int64_t num_empty;
    // The entries in the columns, by row, for gradients of W: compact row and column.
    const int32_t* entry_row;
    const int32_t* entry_column;
    int64_t entries;
};

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
        int64_t count = 0;  // of sums that somebody needs
        std::vector<int64_t> start;
        std::vector<int32_t> index, entry;
    };
    struct Layout {
        std::vector<int32_t> chosen, active, column_source, row_source, empty, entry, entry_row, entry_column;
        std::vector<uint16_t> active_bits;
        std::vector<int32_t> direct;  // entries that a source leads to without a sum: they weigh 1
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
    static SumsLayout make_sums(Lists& lists, int32_t zero_slot, std::vector<int32_t>& source);
    static Sums weigh(const SumsLayout& layout, const float* weight);

    std::shared_ptr<const Layout> layout_;
    std::vector<float> row_weight_;
    std::vector<int32_t> deficient_;
    Sums column_sums_, row_sums_;
    PlanView view_;
};

}  // namespace xtoken::cpu
