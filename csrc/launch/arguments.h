// What the kernels of both backends take: logits, the rows of chunks, labels. All memory is the caller's.
#pragma once

#include <cstdint>

#include "launch/fields.h"

namespace xtoken {

enum class Element { float32, bfloat16, float16 };

constexpr int64_t element_size(Element type) { return type == Element::float32 ? 4 : 2; }

inline Choices choices_of(Element) {
    static constexpr const char* names[] = {"float32", "bfloat16", "float16"};
    return {names, 3};
}

// [samples, length, width]; row r is sample r / length, position r % length. Unit stride within a row; the others in
// elements.
struct Logits {
    void* data;
    Element type;
    int64_t samples, length;
    int32_t width;
    int64_t sample_stride, row_stride;

    int64_t rows() const { return samples * length; }
    char* row(int64_t r) const {
        return static_cast<char*>(data) + element_size(type) * (r / length * sample_stride + r % length * row_stride);
    }
};

// Some numbers in a row.
template <typename T>
struct Values {
    const T* data;
    int64_t size;
};

// Rows of each chunk: start[k] ... start[k] + count[k] - 1. On CUDA chunks that do not count have start -1 and count 0.
struct ChunkRows {
#define XTOKEN_CHUNK_ROWS(FIELD)                                                              \
    FIELD(const int64_t*, start, "[chunks] first row");                                       \
    FIELD(const int64_t*, count, "[chunks] how many rows");                                   \
    FIELD(const int64_t*, next, "[rows] the token that each row predicts; null: not needed"); \
    FIELD(const int64_t*, before, "[chunks] the token before, or -1; null: not needed")
    XTOKEN_FIELDS(XTOKEN_CHUNK_ROWS)
};

// Cross-entropy of the student's rows, added to the gradient.
template <typename Real>
struct LabelsOf {
#define XTOKEN_LABELS(FIELD)                                                                       \
    FIELD(const int64_t*, ids, "[rows] -100: none; null: no labels at all");                       \
    FIELD(const double*, scale, "[] factor of the gradient softmax(z) - onehot; null: no labels"); \
    FIELD(Real*, losses, "[rows] out: logsumexp(z) - z[label], 0 without a label; null: no labels")
    XTOKEN_FIELDS(XTOKEN_LABELS)

    int64_t of(int64_t r) const { return ids == nullptr ? -100 : ids[r]; }
};

// What a loss over chunks takes first. Real is the type of the backend's results.
#define XTOKEN_CHUNKS(FIELD)                                                            \
    FIELD(Logits, student, "[B, T_s, V_student], of the vocabulary's width");           \
    FIELD(Logits, teacher, "[B, T_t, V_teacher], of the vocabulary's width");           \
    FIELD(Logits, grad, "as student, perhaps wider; null: losses only");                \
    FIELD(ChunkRows, student_rows, "the chunks' rows of the student");                  \
    FIELD(ChunkRows, teacher_rows, "the chunks' rows of the teacher");                  \
    FIELD(int64_t, chunks, "how many");                                                 \
    FIELD(const Real*, scale, "[chunks] factors of the chunks' gradients; null: ones"); \
    FIELD(Real, temperature, "of both distributions");                                  \
    FIELD(float, lowest, "smaller logits count as this one")

namespace cpu {
using Real = double;
using Labels = LabelsOf<Real>;
}  // namespace cpu

namespace cuda {
using Real = float;
using Labels = LabelsOf<Real>;

// What a kernel over chunks takes besides XTOKEN_CHUNKS.
#define XTOKEN_QUEUE(FIELD) \
    FIELD(int64_t*, queue,  \
          "[] room for the number of the next chunk, of this call alone; null: a block takes every blocks-th")

// SELL-C-sigma lists (C = 32), which the lanes of a warp read side by side, by four: entries i ... i + 3 of lane l of
// slice k, i a multiple of 4, are those from 32 * (start[k] + i) + 4 * l on. The first `shared` slices are one long
// list each, dealt out to the lanes; list n of the others is in slice shared + (n - shared) / 32. Sorted by length. A
// warp takes a part of the slices, so that those of all parts have about as many entries.
constexpr int32_t list_parts = 16;
#define XTOKEN_LISTS(FIELD)                                         \
    FIELD(int32_t, slices, "how many");                             \
    FIELD(int32_t, shared, "lists that have a slice of their own"); \
    FIELD(int32_t, count, "lists");                                 \
    FIELD(const int32_t*, start, "[slices + 1], multiples of 4");   \
    FIELD(const int32_t*, part, "[list_parts + 1] where the slices of each begin, and those of the last end")

// A grid of blocks that share out some items, and the stream that they run on.
struct Launch {
    int32_t blocks, threads;  // threads: a multiple of 32, at most max_threads
    void* stream;
};
using Launcher = xtoken::Launcher<Launch>;

// What every kernel is compiled for: threads of a block, and blocks that a multiprocessor has room for at once.
constexpr int32_t max_threads = 512;
constexpr int32_t resident_blocks = 1;
}  // namespace cuda

}  // namespace xtoken
