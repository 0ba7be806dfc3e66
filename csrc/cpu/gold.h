// GOLD, H-KL and ULD, forward and backward in one pass over each chunk.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/logits.h"

namespace xtoken::cpu {

// Where the common pairs are, in the layouts that the kernels read; lists are padded with zeros to whole vectors.
struct GoldPlanView {
    const int32_t* partner;              // [teachers] student id; 0 outside the pairs
    const uint16_t* common;              // [teachers / 16] a bit for each teacher id in a pair
    const int32_t* student_others;       // student ids outside the pairs, ascending
    const int32_t* teacher_others;       // teacher ids outside the pairs, ascending
    int64_t student_rest, teacher_rest;  // how many those are
    const int32_t* slot;  // [students] teacher id of the pair, or padded `teachers` + place in student_others
};

// Owns what a view shows.
class GoldPlan {
  public:
    // Throws if an id is out of range or occurs twice.
    GoldPlan(const int64_t* student_ids, const int64_t* teacher_ids, int64_t pairs, int64_t students, int64_t teachers);

    int64_t students() const { return students_; }
    int64_t teachers() const { return teachers_; }
    GoldPlanView view() const;

  private:
    int64_t students_, teachers_, student_rest_, teacher_rest_;
    std::vector<int32_t> partner_, student_others_, teacher_others_, slot_;
    std::vector<uint16_t> common_;
};

struct GoldParams {
    Logits student, teacher;
    Logits grad;  // as student, perhaps wider; data null: losses only
    ChunkRows student_rows, teacher_rows;
    int64_t chunks;
    const double* scale;  // [chunks] factors of the chunks' gradients; null: ones
    double* losses;       // [chunks] out
    double temperature;
    bool reverse;       // of the KL on the pairs
    int64_t top_k;      // ranks that are compared outside the pairs
    float lowest;       // smaller logits count as this one
    GoldPlanView plan;  // slot null: ULD, every token is outside and the shorter side is padded with zeros
};

// Bytes of scratch memory, aligned to 64, that gold_chunk needs for a chunk of `rows` student rows.
int64_t gold_workspace(const GoldParams& params, int64_t rows);

// Chunk k: its loss, and the gradient of its rows.
XTOKEN_KERNEL(void, gold_chunk, (const GoldParams& params, int64_t k, char* workspace))

// All chunks; writes every element of the gradient. One thread computes a chunk: results do not depend on `threads`.
void gold(const GoldParams& params, Level level, int threads);

}  // namespace xtoken::cpu
