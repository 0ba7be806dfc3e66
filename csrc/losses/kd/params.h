// KL for one shared tokenizer, forward and backward in two passes over each pair of rows: parameters of both backends.
#pragma once

#include "cpu/dispatch.h"
#include "launch/arguments.h"
#include "launch/divergence.h"

namespace xtoken {

#define XTOKEN_KD(FIELD)                                \
    XTOKEN_CHUNKS(FIELD);                               \
    XTOKEN_DIVERGES(FIELD, "of the two distributions"); \
    FIELD(Real*, losses, "[chunks] out");               \
    FIELD(Labels, labels, "of the student's rows")

namespace cpu {

struct KdParams {
#define XTOKEN_CPU_KD(FIELD) \
    XTOKEN_KD(FIELD);        \
    FIELD(Values<int32_t>, columns, "[C] ids, ascending; null: all")
    XTOKEN_FIELDS(XTOKEN_CPU_KD)
};

// A set of columns; for all of them the pointers are null.
struct ColumnsView {
    const int32_t* ids;    // [padded count] ascending, filled up to whole vectors with one of them
    const uint16_t* bits;  // [ceil(width / 16)] a bit for each column
    int64_t count;
};

// What a chunk's kernel takes.
struct KdChunks : KdParams {
    ColumnsView set;
};

// Chunk k: its loss, its row's cross-entropy, and the gradient of both.
XTOKEN_KERNEL(void, kd_chunk, (const KdChunks& params, int64_t k, float* workspace))

}  // namespace cpu

namespace cuda {

// A chunk whose first row is negative does not count, and its loss is 0. Labels are of the rows of chunks that count;
// those of other rows are not touched.
struct KdParams {
#define XTOKEN_CUDA_KD(FIELD)                                                       \
    XTOKEN_KD(FIELD);                                                               \
    XTOKEN_QUEUE(FIELD);                                                            \
    FIELD(const int32_t*, chosen, "[columns] ids, ascending; null: all");           \
    FIELD(const int32_t*, place, "[width] place in `chosen`, -1: none; null: all"); \
    FIELD(int32_t, columns, "how many")
    XTOKEN_FIELDS(XTOKEN_CUDA_KD)
};

}  // namespace cuda

}  // namespace xtoken
