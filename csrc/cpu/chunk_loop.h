// The loop of every loss: its chunks in groups of neighbours, then the rows of no chunk, on the threads of the pool.
#pragma once

#include <functional>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/pool.h"
#include "launch/arguments.h"

namespace xtoken::cpu {

// What the loop looks at of a loss's parameters.
struct ChunkLoop {
    Logits student, grad;
    ChunkRows rows;
    int64_t chunks;
    float lowest;
    Labels labels;       // of the rows of no chunk
    int64_t groups = 0;  // of about the same size; 0: as suits the threads

    template <typename Params>
    ChunkLoop(const Params& params, const Labels& given_labels)
        : student(params.student),
          grad(params.grad),
          rows(params.student_rows),
          chunks(params.chunks),
          lowest(params.lowest),
          labels(given_labels) {
        check_rows("student", params.student_rows, params.chunks, params.student);
        check_rows("teacher", params.teacher_rows, params.chunks, params.teacher);
    }

    // Calls body(group, begin, end, scratch) for the chunks begin ... end - 1 of each group. Rows of no chunk get the
    // loss and the gradient of their label, or zeros. One thread works on a group: unless groups are summed by
    // themselves, results do not depend on how many there are, or on the threads.
    using Body = std::function<void(int64_t group, int64_t begin, int64_t end, Scratch& scratch)>;
    void run(const Launch& launch, const Body& body) const;

  private:
    // Throws Error if a chunk has no row, or one that the logits have not.
    static void check_rows(const char* side, const ChunkRows& rows, int64_t chunks, const Logits& logits);
    // The first chunk of each group, and the number of chunks.
    std::vector<int64_t> bounds(int threads) const;
};

}  // namespace xtoken::cpu
