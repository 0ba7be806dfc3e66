// Layouts of W, restricted to a set of teacher columns, for the P-KL kernel.
//
// x = W^T e and h = W u are gathers by index alone: where a column is fed by one entry of weight 1 (most are), x[j] is
// an element of e. Sums of several entries, or of one with another weight, are computed first, 16 at a time, and put
// behind e, so the same gather finds them; so does a zero for columns without entries.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/projection.h"

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

// The matrix in compressed rows and in compressed columns.
class ColumnIndex {
  public:
    ColumnIndex(SparseRows matrix, int64_t teacher_size);

    const SparseRows& rows() const { return rows_; }
    int64_t student_size() const { return static_cast<int64_t>(rows_.row_ptr.size()) - 1; }
    int64_t teacher_size() const { return static_cast<int64_t>(col_ptr_.size()) - 1; }

  private:
    friend class Plan;
    SparseRows rows_;
    std::vector<int64_t> col_ptr_;  // [teacher_size + 1]
    std::vector<int64_t> entry_;    // [nnz] positions in rows_, by column
    std::vector<int32_t> row_;      // [nnz] their rows
};

class Plan {
  public:
    // For all columns (`chosen` empty), or for these: ascending, distinct.
    Plan(const ColumnIndex& matrix, std::vector<int32_t> chosen);

    const PlanView& view() const { return view_; }

  private:
    struct Sums {
        std::vector<int64_t> start;
        std::vector<int32_t> index;
        std::vector<float> weight, remainder;
        SumsView view() const;
    };
    // One row or column: entries [begin, begin + count) of `index` and `weight`.
    struct List {
        int32_t owner;
        int64_t begin;
        int32_t count;
    };
    static Sums make_sums(std::vector<List>& lists, const std::vector<int32_t>& index, const std::vector<float>& weight,
                          int32_t zero_slot, int32_t first_slot, std::vector<int32_t>& source);

    std::vector<int32_t> chosen_, active_, column_source_, row_source_, deficient_, empty_, entry_row_, entry_column_;
    std::vector<uint16_t> active_bits_;
    std::vector<float> row_weight_;
    Sums column_sums_, row_sums_;
    PlanView view_;
};

}  // namespace xtoken::cpu
