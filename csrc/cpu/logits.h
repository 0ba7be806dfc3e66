// Parameter structs that the kernels share: logits, gradients, labels and the rows of chunks.
#pragma once

#include <cstdint>

#include "cpu/element.h"

namespace xtoken::cpu {

// [samples, length, width] in memory of the caller; row r is sample r / length, position r % length. Unit stride within
// a row; the others in elements.
struct Logits {
    void* data;
    Element type;
    int64_t samples, length, width;
    int64_t sample_stride, row_stride;

    int64_t rows() const { return samples * length; }
    char* row(int64_t r) const {
        return static_cast<char*>(data) + element_size(type) * (r / length * sample_stride + r % length * row_stride);
    }
};

// How the definition reads logits and masses (xtoken.reference).
struct Definition {
    float lowest;    // smaller logits count as this one
    double epsilon;  // added to masses before divisions and logarithms
};

// Rows of each chunk: start[k] ... start[k] + count[k] - 1.
struct ChunkRows {
    const int64_t* start;  // [K]
    const int64_t* count;  // [K]
    const int64_t* next;   // [rows] the token that each row predicts; null if not needed
};

// Cross-entropy of the student's rows, added to the gradient.
struct Labels {
    const int64_t* ids;  // [rows] -100: none; null: no labels at all
    double scale;        // factor of the gradient
    double* losses;      // [rows] out: logsumexp(z) - z[label], 0 without a label
    int64_t of(int64_t r) const { return ids == nullptr ? -100 : ids[r]; }
};

}  // namespace xtoken::cpu
