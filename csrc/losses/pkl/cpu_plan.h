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

// Weighted sums as SELL-C-sigma (C = 16): entry i of lane l of slice k is at 16 * (start[k] + i) + l. Sorted by length
// (rows: among so many neighbours), padded with entries of weight 0 that name a zero slot.
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
struct PklPlanView {
    static constexpr const char* kind = "pkl_plan";
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

}  // namespace xtoken::cpu
