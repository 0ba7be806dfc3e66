// KL for one shared tokenizer, forward and backward in two passes over each pair of rows.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/logits.h"

namespace xtoken::cpu {

// A set of columns; for all of them the pointers are null.
struct ColumnsView {
    const int32_t* ids;    // [padded count] ascending, filled up to whole vectors with one of them
    const uint16_t* bits;  // [ceil(width / 16)] a bit for each column
    int64_t count;
};

struct KdParams {
    Logits student, teacher;  // of the same width
    Logits grad;              // as student, perhaps wider; data null: losses only
    ChunkRows student_rows, teacher_rows;
    int64_t chunks;
    const double* scale;  // [chunks] factors of the chunks' gradients; null: ones
    double* losses;       // [chunks] out
    double temperature;
    bool reverse;
    float lowest;  // smaller logits count as this one
    Labels labels;
    ColumnsView columns;
};

// Floats of scratch memory that kd_chunk needs.
int64_t kd_workspace(const KdParams& params);

// Chunk k: its loss, its row's cross-entropy, and the gradient of both.
XTOKEN_KERNEL(void, kd_chunk, (const KdParams& params, int64_t k, float* workspace))

// All chunks, for the columns [count] (null: all); writes every element of the gradient. One thread computes a row:
// results do not depend on `threads`.
void kd(KdParams params, const int32_t* columns, int64_t count, Level level, int threads);

}  // namespace xtoken::cpu
