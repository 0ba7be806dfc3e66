// Two vocabularies with pairs of tokens that mean the same: a KL on the pairs, and the L1 between the sorted
// probabilities elsewhere. Parameters of both backends.
#pragma once

#include "cpu/dispatch.h"
#include "launch/arguments.h"
#include "launch/divergence.h"

namespace xtoken {

namespace cpu {

// Where the pairs are, in the layouts that the kernels read; lists are padded with zeros to whole vectors.
struct PairsView {
    static constexpr const char* kind = "pairs_plan";
    int64_t students, teachers;          // sizes of the vocabularies
    const int32_t* partner;              // [teachers] student id; 0 outside the pairs
    const uint16_t* common;              // [teachers / 16] a bit for each teacher id in a pair
    const int32_t* student_others;       // student ids outside the pairs, ascending
    const int32_t* teacher_others;       // teacher ids outside the pairs, ascending
    int64_t student_rest, teacher_rest;  // how many those are
    const int32_t* slot;  // [students] teacher id of the pair, or padded `teachers` + place in student_others
};

struct RankedParams {
#define XTOKEN_CPU_RANKED(FIELD)                                        \
    XTOKEN_CHUNKS(FIELD);                                               \
    XTOKEN_DIVERGES(FIELD, "of the pairs");                             \
    FIELD(Real*, losses, "[chunks] out");                               \
    FIELD(int64_t, top_k, "ranks that are compared outside the pairs"); \
    FIELD(const PairsView*, plan,                                       \
          "pairs; null: there are none, all ranks are compared, and the shorter side is padded with zeros")
    XTOKEN_FIELDS(XTOKEN_CPU_RANKED)
};

// How many values logits of 16 bits can take.
constexpr int32_t value_counts = 1 << 16;

// Chunk k: its loss, and the gradient of its rows. `counts` [value_counts] are zeros, also afterwards.
XTOKEN_KERNEL(void, ranked_chunk, (const RankedParams& params, int64_t k, int32_t* counts, char* workspace))

}  // namespace cpu

namespace cuda {

// Pairs (student, teacher), and the ids outside, ascending.
struct PairsPlan {
#define XTOKEN_CUDA_PAIRS(FIELD)                                                                       \
    FIELD(int32_t, pairs, "how many");                                                                 \
    FIELD(int32_t, student_rest, "student ids outside");                                               \
    FIELD(int32_t, teacher_rest, "teacher ids outside");                                               \
    FIELD(const int32_t*, student_pair, "[pairs]");                                                    \
    FIELD(const int32_t*, teacher_pair, "[pairs]");                                                    \
    FIELD(const int32_t*, student_others, "[student_rest]");                                           \
    FIELD(const int32_t*, teacher_others, "[teacher_rest]");                                           \
    FIELD(const int32_t*, slot, "[students] teacher id of the pair, or -1 - place in student_others"); \
    FIELD(const int32_t*, student_common, "BitRow [students]: ids in a pair; null: none");             \
    FIELD(const int32_t*, teacher_common, "BitRow [teachers]: likewise; null: none")
    XTOKEN_FIELDS(XTOKEN_CUDA_PAIRS)
};

// "ranked": chunks of one row of 16-bit logits on each side.
struct StepsParams {
#define XTOKEN_CUDA_STEPS(FIELD)                                      \
    XTOKEN_CHUNKS(FIELD);                                             \
    XTOKEN_QUEUE(FIELD);                                              \
    XTOKEN_DIVERGES(FIELD, "of the pairs");                           \
    FIELD(Real*, losses, "[chunks] out");                             \
    FIELD(Labels, labels, "of the chunks' rows");                     \
    FIELD(float*, workspace, "[blocks, workspace]; null: asked for"); \
    FIELD(PairsPlan, plan, "the pairs");                              \
    FIELD(int32_t, ranks, "so many are compared outside the pairs, at most")
    XTOKEN_FIELDS(XTOKEN_CUDA_STEPS)
};

// All other chunks: everything but the sort of the probabilities outside the pairs, which is between "ranked_forward"
// and "ranked_backward".
struct RankedParams {
#define XTOKEN_CUDA_RANKED(FIELD)                                                                            \
    XTOKEN_CHUNKS(FIELD);                                                                                    \
    XTOKEN_QUEUE(FIELD);                                                                                     \
    XTOKEN_DIVERGES(FIELD, "of the pairs");                                                                  \
    FIELD(Real*, losses, "[chunks] out of ranked_forward: on the pairs; null: in ranked_backward");          \
    FIELD(Labels, labels, "of the chunks' rows, for ranked_backward");                                       \
    FIELD(float*, workspace, "[blocks, workspace]; null: asked for");                                        \
    FIELD(PairsPlan, plan, "the pairs");                                                                     \
    FIELD(float*, student_values, "[chunks, student_rest] out of ranked_forward; null: in ranked_backward"); \
    FIELD(float*, teacher_values, "[chunks, teacher_rest] out of ranked_forward; null: in ranked_backward"); \
    FIELD(const float*, slope, "[chunks, student_rest] d L1 / d probability; null: in ranked_forward")
    XTOKEN_FIELDS(XTOKEN_CUDA_RANKED)
};

}  // namespace cuda

}  // namespace xtoken
