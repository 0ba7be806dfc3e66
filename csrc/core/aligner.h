// Alignment of batches: masks and padding, the choice of method, threads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/span.h"
#include "core/token_pair.h"
#include "core/vocabulary.h"

namespace xtoken {

enum class AlignMethod {
    automatic,  // byte merge; where the sides disagree, the dynamic program over just that stretch
    bytes,      // byte merge; what disagrees stays unaligned
    dp,         // the paper's dynamic program over the whole sample
};

// Token ids of one side of a batch, samples one after the other. Owned by the caller.
struct TokenBatch {
    const int64_t* ids;      // [offsets[samples]]
    const int64_t* offsets;  // [samples + 1]
    const uint8_t* mask;     // [offsets[samples]], 0 leaves a token out; or null: leave out padding, by the pad role
};

struct BatchAlignment {
    std::vector<Span> spans;         // [K], positions within each sample, masked tokens counted
    std::vector<int64_t> offsets;    // [samples + 1] into spans
    std::vector<uint8_t> predicted;  // [K], 1 if on both sides an unmasked token stands right before the chunk
    std::vector<uint8_t> optimal;    // [samples], 0 if a dynamic program ran out of its budget
};

class Aligner {
  public:
    Aligner(const Vocabulary& student, const Vocabulary& teacher, CanonicalRules rules);

    // Throws Error (value) if an unmasked id is out of range, naming side, sample and position. `cell_budget` bounds
    // the table cells of each dynamic program.
    BatchAlignment align(const TokenBatch& student, const TokenBatch& teacher, int64_t samples, AlignMethod method,
                         int64_t cell_budget, int threads) const;

  private:
    // The id that pads a side, and what else it stands for (many tokenizers pad with eos).
    struct Padding {
        int32_t id = -1;
        bool is_bos = false, is_end = false;
    };
    struct Workspace;

    static Padding find_padding(const Vocabulary& vocabulary);
    // Leaves chunks and predicted of one sample in `work`; returns whether the result is optimal.
    bool align_sample(const TokenBatch& student, const TokenBatch& teacher, int64_t sample, AlignMethod method,
                      int64_t cell_budget, Workspace& work) const;

    TokenPair pair_;
    Padding student_padding_, teacher_padding_;
};

}  // namespace xtoken
