// P-KL, forward and backward in one pass over each chunk.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/logits.h"
#include "cpu/plan.h"

namespace xtoken::cpu {

enum class Merge { first, mean, chain };

struct PklParams {
    Logits student, teacher;
    Logits grad;  // as student, perhaps wider; data null: losses only
    ChunkRows student_rows, teacher_rows;
    int64_t chunks;
    const double* scale;  // [chunks] factors of the chunks' gradients; null: ones
    double* losses;       // [chunks] out
    double temperature;
    Merge merge;
    bool reverse;
    Definition definition;
    Labels labels;
    double* weight_grad;  // [plan.entries] out, by row of W then column; null: not wanted
    PlanView plan;
};

// Floats of scratch memory that pkl_chunk needs.
int64_t pkl_workspace(const PlanView& plan);

// Chunk k: its loss, and the gradient of its rows. `weight_sum` [plan.entries] is added to, unless null.
XTOKEN_KERNEL(void, pkl_chunk, (const PklParams& params, int64_t k, float* workspace, float* weight_sum))

// All chunks. Writes every element of the gradient. Every chunk is computed by one thread, and sums over chunks are in
// a fixed order, so results do not depend on `threads`.
void pkl(const PklParams& params, Level level, int threads);

}  // namespace xtoken::cpu
