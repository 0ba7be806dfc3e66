// Prefix KL, forward and backward, chunk by chunk: parameters of both backends.
#pragma once

#include "core/piece_index.h"
#include "cpu/dispatch.h"
#include "launch/arguments.h"
#include "launch/divergence.h"

namespace xtoken {

// The logits are as wide as the vocabularies of the piece index.
#define XTOKEN_PREFIX(FIELD)                                                                   \
    XTOKEN_CHUNKS(FIELD);                                                                      \
    XTOKEN_DIVERGES(FIELD, "of the two distributions at a boundary");                          \
    FIELD(bool, weighted, "inner boundaries, by the teacher's probability of what is before"); \
    FIELD(Real*, losses, "[chunks] out");                                                      \
    FIELD(Labels, labels, "of the student's rows")

constexpr int32_t absent_event = INT32_MIN;  // one that a side lacks

namespace cpu {

// SELL-C-sigma lists of tokens (C = 16), longest first: token i of lane l of slice k is
// tokens[16 * (start[k] + i) + l].
struct TokensView {
    int64_t slices;
    const int64_t* start;   // [slices + 1]
    const int32_t* tokens;  // [16 * start[slices]]; behind the end of a list any token
    const int32_t* lanes;   // [start[slices]] how many lanes have that token; the others' lists are shorter
};

// One vocabulary at the start of a chunk.
struct StartView {
    TokensView lists;  // the tokens of events that are no pairs, but that both sides have
    // Tokens of events that the other side does not have.
    const int32_t* absent;        // [padded count]
    const uint16_t* absent_bits;  // [padded tokens / 16] one bit a token
    int64_t absent_count;
    const uint16_t* paired_bits;  // [padded tokens / 16] one bit a token
    // [events] the token of a pair; -1 - the number of a list; `absent_event` if the other side lacks it.
    const int32_t* of_event;
    // [events + 1], tokens: those of event e are tokens[ptr[e]] ... tokens[ptr[e + 1] - 1], and 16 numbers more can be
    // read.
    const int32_t* ptr;
    const int32_t* tokens;
    // [tokens + 1], events: those known not to follow token w are known[known_ptr[w]] ... known[known_ptr[w + 1] - 1],
    // ascending; at most `most_known`.
    const int32_t* known_ptr;
    const int32_t* known;
    int64_t most_known;
};

// A piece index, and the events at the start of a chunk as the kernels read them. Most are pairs: one token on each
// side.
struct PrefixPlanView {
    static constexpr const char* kind = "prefix_plan";
    PieceIndex index;
    const uint8_t* merged;  // [events] whether calibration has merged it from several
    // Teacher ids of the students' pairs; else the slot behind `padded teachers`, which is zero.
    const int32_t* partner;      // [padded students]
    const int32_t* partner_run;  // [padded students / 16] the first, if the others that are paired follow; else -1
    StartView student, teacher;
    // The other events that both sides have, each a list on both sides. They are numbered by their students' lists.
    int64_t events;
    const int32_t* teacher_list;  // [padded events] the number of the teacher's list
    // Student tokens that are no part of a pair, ascending: the number of their list, or `padded events` for none.
    const int32_t* other_list;  // [padded others]
    int64_t others;
};

struct PrefixParams {
#define XTOKEN_CPU_PREFIX(FIELD) \
    XTOKEN_PREFIX(FIELD);        \
    FIELD(const PrefixPlanView*, plan, "a piece index")
    XTOKEN_FIELDS(XTOKEN_CPU_PREFIX)
};

// What a chunk's kernel takes: the boundaries of chunk k are boundaries[first_boundary[k]] ...
// boundaries[first_boundary[k + 1] - 1], and no token continues in more than `most` ways.
struct PrefixChunks : PrefixParams {
    const InnerBoundary* boundaries;
    const int64_t* first_boundary;  // [chunks + 1]
    int64_t most;
};

// Chunk k: its loss, its rows' cross-entropy, and the gradient of both.
XTOKEN_KERNEL(void, prefix_chunk, (const PrefixChunks& params, int64_t k, char* workspace))

}  // namespace cpu

namespace cuda {

// Tokens, -1 where there is none.
struct TokenLists {
#define XTOKEN_TOKEN_LISTS(FIELD) \
    XTOKEN_LISTS(FIELD);          \
    FIELD(const int32_t*, tokens, "[32 * start[slices]]")
    XTOKEN_FIELDS(XTOKEN_TOKEN_LISTS)
};

// One vocabulary of a piece index; see PieceSide in core/piece_index.h.
struct PrefixSide {
#define XTOKEN_PREFIX_SIDE(FIELD)                                       \
    FIELD(int32_t, size, "tokens");                                     \
    FIELD(const int32_t*, event, "[size]");                             \
    FIELD(const int32_t*, length, "[size]");                            \
    FIELD(const int32_t*, order, "[size]");                             \
    FIELD(const int32_t*, ptr, "[size + 1]");                           \
    FIELD(const int32_t*, pieces, "[ptr[size]]");                       \
    FIELD(const int32_t*, by_event_ptr, "[events + 1]");                \
    FIELD(const int32_t*, by_event, "[size] the tokens of each event"); \
    FIELD(const int32_t*, known_ptr, "[size + 1]");                     \
    FIELD(const int32_t*, known, "[known_ptr[size]] events that do not follow a token, ascending")
    XTOKEN_FIELDS(XTOKEN_PREFIX_SIDE)
};
using PrefixSides = PrefixSide[2];

// The events at the start of a chunk. Most are pairs: one token on each side. The others that both sides have are
// numbered as their student's lists; student tokens in events that the teacher lacks count as one more, the last, which
// has no teacher's list.
struct PrefixPlan {
#define XTOKEN_PREFIX_PLAN(FIELD)                                                                                   \
    FIELD(PrefixSides, side, "student, teacher");                                                                   \
    FIELD(const int32_t*, slot, "[students] the partner's teacher id, or -1 - the number of the event");            \
    FIELD(int32_t, events, "without the one more");                                                                 \
    FIELD(TokenLists, student_lists, "the student's tokens of events");                                             \
    FIELD(TokenLists, teacher_lists, "the teacher's tokens of events");                                             \
    FIELD(int32_t, unmatched, "the student's list of what the teacher lacks");                                      \
    FIELD(const int32_t*, teacher_list, "[events] the number of the teacher's list");                               \
    FIELD(const int32_t*, place, "[all events] the student's token of a pair, -1 - the number, or `absent_event`"); \
    FIELD(const int32_t*, number, "[teachers] of the event; -1: a pair, `events`: the student lacks it");           \
    FIELD(const uint8_t*, merged, "[all events] whether calibration has merged it from several");                   \
    FIELD(int32_t, most, "tokens of a side whose first piece is the same, at most")
    XTOKEN_FIELDS(XTOKEN_PREFIX_PLAN)
};

// The tokens of chunks must be in the vocabularies.
struct PrefixParams {
#define XTOKEN_CUDA_PREFIX(FIELD)                                     \
    XTOKEN_PREFIX(FIELD);                                             \
    XTOKEN_QUEUE(FIELD);                                              \
    FIELD(float*, workspace, "[blocks, workspace]; null: asked for"); \
    FIELD(PrefixPlan, plan, "a piece index")
    XTOKEN_FIELDS(XTOKEN_CUDA_PREFIX)
};

}  // namespace cuda

}  // namespace xtoken
