// Alignment of batches: masks and padding, the choice of method, threads.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "core/align_bytes.h"
#include "core/span.h"
#include "core/token_pair.h"
#include "core/vocabulary.h"

namespace xtoken {

enum class AlignMethod {
    automatic,  // byte merge; where the sides disagree, the dynamic program over just that stretch
    bytes,      // byte merge; what disagrees stays unaligned
    dp,         // the paper's dynamic program over the whole sample
};

// The token ids of one side of a sample. Owned by the caller.
struct TokenRow {
    const int64_t* ids;   // [length]
    const uint8_t* mask;  // [length], 0 leaves a token out; or null: leave out padding, by the pad role
    int64_t length;
};

// An array whose elements are written later; memory is only committed where it is written.
template <typename T>
struct Buffer {
    explicit Buffer(size_t capacity = 0) : data(static_cast<T*>(std::malloc(capacity * sizeof(T) + 1)), std::free) {
        if (!data) throw std::bad_alloc();
    }
    // Frees what lies after the first `count` elements.
    void cut(size_t count) {
        T* kept = static_cast<T*>(std::realloc(data.get(), count * sizeof(T) + 1));
        if (!kept) return;  // the longer block is still valid
        data.release();
        data.reset(kept);
        size = count;
    }

    std::unique_ptr<T, decltype(&std::free)> data;
    size_t size = 0;
};

struct BatchAlignment {
    Buffer<Span> spans;            // [K], positions within each sample, masked tokens counted
    Buffer<uint8_t> predicted;     // [K], 1 if on both sides an unmasked token stands right before the chunk
    std::vector<int64_t> offsets;  // [samples + 1] into spans
    std::vector<uint8_t> optimal;  // [samples], 0 if a dynamic program ran out of its budget
};

class Aligner {
  public:
    Aligner(const Vocabulary& student, const Vocabulary& teacher, CanonicalRules rules);

    // Throws Error (value) if the sides differ in samples, or an unmasked id is out of range, naming side, sample and
    // position. `cell_budget` bounds the table cells of each dynamic program.
    BatchAlignment align(const std::vector<TokenRow>& student, const std::vector<TokenRow>& teacher, AlignMethod method,
                         int64_t cell_budget, int threads) const;

  private:
    // The id that pads a side, and what else it stands for (many tokenizers pad with eos).
    struct Padding {
        int32_t id = -1;
        bool is_bos = false, is_end = false;
    };
    struct Part;
    struct Workspace;

    static Padding find_padding(const Vocabulary& vocabulary);
    // Appends the chunks of one sample to `part`; returns whether the result is optimal.
    bool align_sample(const TokenRow& student, const TokenRow& teacher, int64_t sample, AlignMethod method,
                      int64_t cell_budget, Workspace& work, Part& part) const;
    // Appends the dynamic program's chunks over `gap`; returns whether they are optimal. Ties fall the same way
    // whichever side is called the student.
    bool bridge(const Span& gap, int64_t cell_budget, const Workspace& work, std::vector<Span>& chunks) const;

    TokenPair pair_;
    Padding student_padding_, teacher_padding_;
    SideOrder order_;  // of the vocabularies
};

}  // namespace xtoken
