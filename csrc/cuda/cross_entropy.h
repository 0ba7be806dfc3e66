// Next-token cross-entropy of rows, and the rows of a gradient that belong to no chunk.
#pragma once

#include "cuda/arguments.h"

namespace xtoken::cuda {

struct CrossEntropyParams {
    Logits student;  // of the vocabulary's width
    Logits grad;     // as student, perhaps wider; data null: losses only
    Labels labels;
    float lowest;  // smaller logits count as this one
    bool add;      // to `factor` times the gradient, and nothing at all if the scale is 0 and that is 1; else every
                   // element of a row is written, zeros where it has no label
    const float* factor;  // [] null: 1
    const uint8_t* skip;  // [rows] rows to leave alone; null: none
};

void cross_entropy(const CrossEntropyParams& params, const Launch& launch);

// covered[r] = 1 for every row of a chunk.
void mark_rows(const int64_t* start, const int64_t* count, int64_t chunks, uint8_t* covered, const Launch& launch);

}  // namespace xtoken::cuda
