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

// One vocabulary at the start of a chunk.
struct StartView {
    ListsView lists;  // the tokens of events that are no pairs, but that both sides have
    // Tokens of events that the other side does not have.
    const int32_t* absent;        // [padded count]
    const uint16_t* absent_bits;  // [padded tokens / 16] one bit a token
    int64_t absent_count;
    const uint16_t* paired_bits;  // [padded tokens / 16] one bit a token
};

// The events at the start of a chunk, as the kernels read them. Most are pairs: one token on each side.
struct PrefixPlanView {
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
    // How an event is laid out.
    enum class Kind : char { pair, list, absent };
    struct Start {
        std::vector<int64_t> start{0};
        std::vector<int32_t> tokens, lanes, absent;
        int64_t absent_count = 0;
        std::vector<uint16_t> absent_bits, paired_bits;
        StartView view() const;
    };
    // Fills `out`; returns for each event that is a list its number.
    static std::vector<int32_t> lay_out(const PieceSide& side, const std::vector<Kind>& kinds, Start& out);

    std::vector<int32_t> data_;
    PieceIndex index_;
    int64_t events_ = 0, others_ = 0;
    std::vector<int32_t> partner_, partner_run_, teacher_list_, other_list_;
    Start student_, teacher_;
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
