// KL for one shared tokenizer, forward and backward in one pass over each pair of rows.
#pragma once

#include "cuda/arguments.h"

namespace xtoken::cuda {

struct KdParams {
    Logits student, teacher;      // of the vocabulary's width, the same on both sides
    Logits grad;                  // as student, perhaps wider; data null: losses only
    const int64_t* student_rows;  // [K] negative: this chunk does not count, its loss is 0
    const int64_t* teacher_rows;  // [K]
    int64_t chunks;
    const int32_t* chosen;  // [columns] ids, ascending; null: all
    const int32_t* place;   // [width] place in `chosen`, -1: none; null: all
    int32_t columns;
    const float* scale;  // [chunks] factors of the chunks' gradients; null: ones
    float* losses;       // [chunks] out
    float temperature;
    bool reverse;
    float lowest;   // smaller logits count as this one
    Labels labels;  // of the rows of chunks that count; those of other rows are not touched
};

// All chunks, each by one block; rows of the gradient that belong to no chunk are not touched.
void kd(const KdParams& params, const Launch& launch);

}  // namespace xtoken::cuda
