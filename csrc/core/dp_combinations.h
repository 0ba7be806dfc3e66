// The two sequences as the dynamic program sees them: a small alphabet of their own, and every combination in
// it.
//
// Each distinct symbol of the document becomes a letter 0, 1, ... . A window is a run of 2 ... kMaxRun tokens
// of one side that spells a letter of the other side; with the windows known, every move of the recurrence is
// one comparison of integers. Windows are found by a polynomial hash, extended one token to the left in O(1),
// and verified byte by byte, so a collision costs time but never correctness.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "core/dp_move.h"
#include "core/token_pair.h"

namespace xtoken::dp {

struct Window {
    int32_t first, last;  // tokens, both included
    int32_t letter;       // what they spell: a letter of the other side
};

struct Sequence {
    std::vector<int32_t> letters;  // [n]
    std::vector<Window> windows;   // by last token, then by length
    // [k][i]: the letter that the k tokens ending at i spell, or -1. Only k = 2 ... kMaxRun.
    std::array<std::vector<int32_t>, kMaxRun + 1> spelled;
    // [letter]: bit k is set if some k tokens of this side spell it.
    std::vector<uint8_t> run_lengths;

    int32_t size() const { return static_cast<int32_t>(letters.size()); }
};

class Document {
  public:
    // Storage is reused from one document to the next.
    void assign(const TokenPair& pair, const int32_t* student_symbols, int32_t n, const int32_t* teacher_symbols,
                int32_t m);

    const Sequence& student() const { return student_; }
    const Sequence& teacher() const { return teacher_; }
    int32_t num_letters() const { return static_cast<int32_t>(letters_.size()); }
    bool is_atomic(int32_t letter) const { return letters_[letter].atomic; }
    std::string_view text(int32_t letter) const { return letters_[letter].text; }  // empty if atomic
    // Length of the letter for counting offsets: an atomic one counts as a character that nothing else
    // spells.
    int32_t length(int32_t letter) const {
        return is_atomic(letter) ? 1 : static_cast<int32_t>(letters_[letter].text.size());
    }
    bool has_empty_token() const { return has_empty_; }

  private:
    struct Letter {
        int32_t symbol;
        bool atomic;
        std::array<bool, 2> on_side;  // student, teacher
        std::string_view text;
        uint64_t hash, shift;  // of the text; kBase^length
    };
    struct Slot {
        uint32_t tag;  // high half of the hash
        int32_t letter;
    };

    void read_letters(const TokenPair& pair, const int32_t* symbols, int32_t count, int side, Sequence& sequence);
    void index_texts();
    int32_t find_text(uint64_t hash, int side, const int32_t* run, int count) const;
    void find_windows(Sequence& sequence, int other_side);

    Sequence student_, teacher_;
    std::vector<Letter> letters_;
    std::vector<int32_t> letter_of_symbol_;  // -1 if not in the document
    std::vector<Slot> slots_;                // open addressing by hash; letter -1 is free
    std::array<size_t, 2> longest_{};        // text on each side
    bool has_empty_ = false;
};

}  // namespace xtoken::dp
