// Parameters that the kernels share: logits, the rows of chunks, labels, and how to launch. All memory is the caller's,
// on the device.
#pragma once

#include <cstdint>

namespace xtoken::cuda {

enum class Element { float32, bfloat16, float16 };

// [samples, length, width]; row r is sample r / length, position r % length. Unit stride within a row; the others in
// elements.
struct Logits {
    void* data;
    Element type;
    int64_t samples, length;
    int32_t width;
    int64_t sample_stride, row_stride;
};

// Rows of each chunk: start[k] ... start[k] + count[k] - 1.
struct ChunkRows {
    const int64_t* start;  // [K]
    const int64_t* count;  // [K]
    const int64_t* next;   // [rows] the token that each row predicts; null if not needed
};

// Cross-entropy of the student's rows, added to the gradient.
struct Labels {
    const int64_t* ids;   // [rows] -100: none; null: no labels at all
    const double* scale;  // [] factor of the gradient
    float* losses;        // [rows] out: logsumexp(z) - z[label], 0 without a label; nan for an id out of range
};

// A grid of blocks that each take every blocks-th item, and the stream that they run on.
struct Launch {
    int32_t blocks, threads;  // threads: a multiple of 32, at most max_threads
    void* stream;
};

// Threads of a block that every kernel is compiled for.
constexpr int32_t max_threads = 512;

}  // namespace xtoken::cuda
