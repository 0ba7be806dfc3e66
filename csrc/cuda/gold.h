// GOLD and H-KL: everything but the sort of the tokens outside the common pairs.
#pragma once

#include "cuda/arguments.h"

namespace xtoken::cuda {

// Common pairs (student, teacher), and the ids outside, ascending.
struct GoldPlan {
    int32_t pairs, student_rest, teacher_rest;
    const int32_t* student_pair;    // [pairs]
    const int32_t* teacher_pair;    // [pairs]
    const int32_t* student_others;  // [student_rest]
    const int32_t* teacher_others;  // [teacher_rest]
    const int32_t* slot;            // [students] teacher id of the pair, or -1 - place in student_others
};

struct GoldParams {
    Logits student, teacher;  // of the vocabularies' widths
    Logits grad;              // as student, perhaps wider
    ChunkRows student_rows, teacher_rows;
    int64_t chunks;
    const float* scale;  // [chunks] factors of the chunks' gradients; null: ones
    float temperature;
    bool reverse;      // of the KL on the pairs
    float lowest;      // smaller logits count as this one
    float* workspace;  // [blocks, gold_workspace]
    GoldPlan plan;
    float* common;          // [chunks] out of gold_forward
    float* student_values;  // [chunks, student_rest] out of gold_forward: probabilities outside the pairs
    float* teacher_values;  // [chunks, teacher_rest]
    const float* slope;     // [chunks, student_rest] into gold_backward: d uncommon / d probability
    Labels labels;          // into gold_backward, of the chunks' rows
};

// Floats of workspace that a block needs.
int64_t gold_workspace(int32_t students, int32_t teachers);

// The loss on the pairs, and the probabilities outside.
void gold_forward(const GoldParams& params, const Launch& launch);

// The gradient of all rows of the chunks; other rows are not touched.
void gold_backward(const GoldParams& params, const Launch& launch);

}  // namespace xtoken::cuda
