// The piece index: the common events of two vocabularies, and each vocabulary in the order of its pieces.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/projection.h"
#include "core/vocabulary.h"

namespace xtoken {

// For every token the token of the other side with the same symbol (core/token_pair.h), or -1. Of several the one that
// the tokenizer produces: normal before byte, then the lowest id.
struct Partners {
    std::vector<int32_t> student;  // [V_student] teacher ids
    std::vector<int32_t> teacher;  // [V_teacher] student ids
};
Partners partners(const Vocabulary& student, const Vocabulary& teacher);

// One vocabulary as the index has it. Pieces are ids of the other vocabulary, which spell the token; a piece equal to
// the other vocabulary's size stands for a rest that the other side cannot spell. A token with a partner has that as
// its only piece, and a token that stands for no text has none.
struct PieceSide {
    int32_t size;           // V
    const int32_t* event;   // [V] in [0, events)
    const int32_t* length;  // [V] bytes of text
    // [V] token ids, ascending by their sequences of pieces (a prefix first), then by id. Pieces come by their events
    // on the other side, then by id: so of the tokens that begin with the same pieces, those that go on with the same
    // event are neighbours.
    const int32_t* order;
    const int32_t* ptr;  // [V + 1]: token t has the pieces pieces[ptr[t]] ... pieces[ptr[t + 1] - 1]
    const int32_t* pieces;
    // [V + 1]: after token w the tokenizer never writes joined[joined_ptr[w]] ... joined[joined_ptr[w + 1] - 1], tokens
    // of its own with a partner, ascending: both together are a token.
    const int32_t* joined_ptr;
    const int32_t* joined;
};

// The whole index in one array: how it is stored and passed on. The head holds V_student, V_teacher, the number of
// events, and of each side that of pieces, then that of joined tokens; the arrays of `PieceSide` follow, the student's
// first.
constexpr size_t kPieceIndexHead = 7;
struct PieceIndex {
    int32_t events;                 // tokens without a root, if there are any, form the last one
    std::array<PieceSide, 2> side;  // student, teacher

    // Views `data`. Throws Error if its size is not what the head says, or with `all` if any number does not fit.
    static PieceIndex view(const int32_t* data, size_t size, bool all);
};

// Builds the array. Row k of `student_pieces` cuts the token student_rows[k] (increasing, tokens without a partner)
// into teacher tokens; likewise for the teacher.
//
// The event of a token is its root: itself with a partner, else the root of its first piece. A step to a piece goes to
// a strictly shorter text, so it ends.
std::vector<int32_t> build_piece_index(const Vocabulary& student, const Vocabulary& teacher,
                                       const std::vector<int32_t>& student_rows, const Sequences& student_pieces,
                                       const std::vector<int32_t>& teacher_rows, const Sequences& teacher_pieces);

// The array with event_of[e], numbers from 0 on without gaps, in the place of event e. Throws Error as `view` does.
std::vector<int32_t> merge_events(const int32_t* data, size_t size, const std::vector<int32_t>& event_of);

// Rows of logits that predict the tokens of each chunk, and those tokens: chunk k has the rows
// start[k] ... start[k] + count[k] - 1, and next[row] is the token that a row predicts.
struct PredictedTokens {
    const int64_t* start;  // [chunks]
    const int64_t* count;  // [chunks]
    const int64_t* next;   // [rows]
    int64_t rows;
};

// A place inside a chunk where one side (`part`) starts a token within a token of the other side (`whole`).
struct InnerBoundary {
    int64_t chunk;
    int64_t whole_side;  // 0: the student's token continues, 1: the teacher's
    int64_t whole_row;   // predicts the token that continues
    int64_t part_row;    // predicts the token that starts
    int64_t depth;       // tokens of `part` since `whole` began: the known pieces of its token
    int64_t first,
        last;  // order[first] ... order[last - 1] of the whole side are the tokens that begin with these pieces
};

// The inner boundaries that count, chunk by chunk: both sides of the chunk have the same length, the token that
// continues began where a token of the other side began, and its pieces begin with the tokens since then. Throws Error
// if a chunk's token is outside the vocabulary.
std::vector<InnerBoundary> inner_boundaries(const PieceIndex& index, size_t chunks, const PredictedTokens& student,
                                            const PredictedTokens& teacher);

}  // namespace xtoken
