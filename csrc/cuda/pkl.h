// P-KL, forward and backward in one pass over each chunk.
#pragma once

#include "cuda/arguments.h"

namespace xtoken::cuda {

enum class Merge { first, mean, chain };

// Weighted sums, a warp to a slice of 32 side by side: entry i of lane l of slice k is at 32 * (start[k] + i) + l. The
// first `shared` slices are one long list each, dealt out to the lanes; list n of the others is in slice shared + (n -
// shared) / 32. Sorted by length; filled up with entries of weight 0 that name some element.
struct Lists {
    int32_t slices, shared, count;
    const int32_t* start;   // [slices + 1]
    const int32_t* index;   // [32 * start[slices]]
    const float* weight;    // as index
    const uint8_t* wanted;  // [count] sums that are needed; null: all
};

// W in the teacher columns C. x = W^T e and h = W u are gathers by index alone: most columns are fed by one entry of
// weight 1, and the sums of the others are computed first and put behind e and u, with a zero for those without
// entries.
struct PklPlan {
    int32_t students, columns;
    const int32_t* chosen;       // [columns] distinct teacher ids; null: all
    const int32_t* count;        // [] how many of them, from the first on, are the set; null: all
    const int32_t* column_slot;  // [columns] in (e [students], 0, sums of column_lists)
    const int32_t* row_slot;     // [students] in (u [columns], 0, sums of row_lists)
    const float* row_weight;     // [students] sum of the row's weights in C
    Lists column_lists;          // of student ids
    Lists row_lists;             // of places in C, or the zero behind them
    // The entries in C, for gradients of W; null if those are not wanted.
    const int64_t* entry_row;     // [entries] student ids
    const int64_t* entry_column;  // [entries] places in C, or the zero behind them
    int64_t entries;
};

struct PklParams {
    Logits student, teacher;  // of the vocabularies' widths
    Logits grad;              // as student, perhaps wider; data null: losses only
    ChunkRows student_rows, teacher_rows;
    int64_t chunks;
    const float* scale;  // [chunks] factors of the chunks' gradients; null: ones
    float* losses;       // [chunks] out; nan for a set of no column
    float temperature;
    Merge merge;
    bool reverse;
    float lowest;   // smaller logits count as this one
    float epsilon;  // added to masses before divisions and logarithms
    Labels labels;
    float* weight_sums;  // [blocks, entries] zeros, receives each block's part of the gradient of W; null: not wanted
    float* workspace;    // [blocks, pkl_workspace]
    PklPlan plan;
};

// Floats of workspace that a block needs.
int64_t pkl_workspace(const PklPlan& plan, Merge merge);

// All chunks, each by one block; rows of the gradient that belong to no chunk are not touched.
void pkl(const PklParams& params, const Launch& launch);

// row_weight[s] = sum of the weights of row s of W whose column has a place >= 0.
void row_weights(const int64_t* row_ptr, const int32_t* col, const float* weight, const int32_t* place, int32_t rows,
                 float* row_weight, const Launch& launch);

// out[e] = sum over the blocks of sums[block, e], in the order of the blocks.
void sum_blocks(const float* sums, int32_t blocks, int64_t entries, float* out, const Launch& launch);

}  // namespace xtoken::cuda
