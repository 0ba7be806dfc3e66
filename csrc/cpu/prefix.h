// Prefix KL, forward and backward, chunk by chunk.
#pragma once

#include <cstdint>
#include <vector>

#include "core/piece_index.h"
#include "cpu/dispatch.h"
#include "cpu/logits.h"

namespace xtoken::cpu {

// Lists of tokens, 16 side by side, longer ones first: token i of lane l of slice k is tokens[16 * (start[k] + i) + l].
struct ListsView {
    int64_t slices;
    const int64_t* start;   // [slices + 1]
    const int32_t* tokens;  // [16 * start[slices]]; behind the end of a list any token
    const int32_t* lanes;   // [start[slices]] how many lanes have that token; the others' lists are shorter
};

// The events at the start of a chunk, as the kernels read them. Most are pairs: one token on each side.
struct PrefixPlanView {
    const int32_t* partner;       // [padded students] teacher id of a pair; else 0
    const int32_t* partner_run;   // [padded students / 16] the first, if the others that are paired follow; else -1
    const uint16_t* paired_bits;  // [padded students / 16] one bit a student id
    // The other events that both sides have, each a list on both sides. They are numbered by their students' lists.
    int64_t events;
    ListsView student, teacher;
    const int32_t* teacher_list;  // [padded events] the number of the teacher's list
    // Student tokens outside the pairs, ascending: where they are in the students' lists, or behind the last for none.
    const int32_t* other_place;  // [padded others]
    int64_t others;
};

// Owns a piece index and the layout of its events.
class PrefixPlan {
  public:
    // Throws Error if the data is not a piece index.
    explicit PrefixPlan(std::vector<int32_t> data);
    PrefixPlan(const PrefixPlan&) = delete;
    PrefixPlan& operator=(const PrefixPlan&) = delete;

    const PieceIndex& index() const { return index_; }
    PrefixPlanView view() const;

  private:
    struct Lists {
        std::vector<int64_t> start{0};
        std::vector<int32_t> tokens, lanes;
        ListsView view() const;
    };
    // Fills `lists`; returns where each token is in them, and for none the place behind the last, by token id. `number`
    // [events] receives the number of each list, which is -1 where it is not wanted.
    static std::vector<int32_t> lay_out(const PieceSide& side, std::vector<int32_t>& number, Lists& lists);

    std::vector<int32_t> data_;
    PieceIndex index_;
    int64_t events_ = 0, others_ = 0;
    std::vector<int32_t> partner_, partner_run_, teacher_list_, other_place_;
    std::vector<uint16_t> paired_bits_;
    Lists student_, teacher_;
};

struct PrefixParams {
    Logits student, teacher;  // as wide as the vocabularies of the index
    Logits grad;              // as student, perhaps wider; data null: losses only
    ChunkRows student_rows, teacher_rows;
    int64_t chunks;
    const double* scale;  // [chunks] factors of the chunks' gradients; null: ones
    double* losses;       // [chunks] out
    double temperature;
    bool reverse;
    float lowest;  // smaller logits count as this one
    Labels labels;
    PieceIndex index;
    PrefixPlanView plan;
    // Set by `prefix`: the boundaries of chunk k are boundaries[first_boundary[k]] ... boundaries[first_boundary[k + 1]
    // - 1], and no token goes on in more than `most` ways.
    const InnerBoundary* boundaries;
    const int64_t* first_boundary;  // [chunks + 1]
    int64_t most;
};

// Bytes of scratch memory, aligned to 64, that prefix_chunk needs.
int64_t prefix_workspace(const PrefixParams& params);

// Chunk k: its loss, its rows' cross-entropy, and the gradient of both.
XTOKEN_KERNEL(void, prefix_chunk, (const PrefixParams& params, int64_t k, char* workspace))

// All chunks; writes every element of the gradient. Throws Error if a chunk's token is outside the vocabulary. One
// thread computes a chunk: results do not depend on `threads`.
void prefix(PrefixParams params, Level level, int threads);

}  // namespace xtoken::cpu
