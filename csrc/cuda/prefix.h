// Prefix KL, forward and backward in one pass over each chunk.
#pragma once

#include "cuda/arguments.h"

namespace xtoken::cuda {

// Lists of tokens, a warp to a slice of 32 side by side: token i of lane l of slice k is tokens[32 * (start[k] + i) +
// l], -1 where there is none. The first `shared` slices are one long list each, dealt out to the lanes; list n of the
// others is in slice shared + (n - shared) / 32. Sorted by length.
struct TokenLists {
    int32_t slices, shared, count;
    const int32_t* start;   // [slices + 1]
    const int32_t* tokens;  // [32 * start[slices]]
    const int32_t* event;   // [count] the number of each list's event
};

// One vocabulary of a piece index; see PieceSide in core/piece_index.h.
struct PrefixSide {
    int32_t size;
    const int32_t* length;  // [size]
    const int32_t* order;   // [size]
    const int32_t* ptr;     // [size + 1]
    const int32_t* pieces;  // [ptr[size]]
};

// The events at the start of a chunk. Most are pairs: one token on each side. The others that both sides have are
// numbered; student tokens in events that the teacher lacks count as one more, which has no teacher's list.
struct PrefixPlan {
    PrefixSide side[2];   // student, teacher
    const int32_t* slot;  // [students] the partner's teacher id, or -1 - the number of the event
    int32_t events;       // without the one more
    TokenLists student_lists, teacher_lists;
    int32_t most;  // tokens of a side whose first piece is the same, at most
};

struct PrefixParams {
    Logits student, teacher;  // of the vocabularies' widths
    Logits grad;              // as student, perhaps wider; data null: losses only
    ChunkRows student_rows, teacher_rows;
    int64_t chunks;
    const float* scale;  // [chunks] factors of the chunks' gradients; null: ones
    float* losses;       // [chunks] out
    float temperature;
    bool reverse;
    float lowest;  // smaller logits count as this one
    Labels labels;
    float* workspace;  // [blocks, prefix_workspace]
    PrefixPlan plan;
};

// Floats of workspace that a block needs.
int64_t prefix_workspace(const PrefixPlan& plan);

// All chunks, each by one block; rows of the gradient that belong to no chunk are not touched. The tokens of chunks
// must be in the vocabularies.
void prefix(const PrefixParams& params, const Launch& launch);

}  // namespace xtoken::cuda
