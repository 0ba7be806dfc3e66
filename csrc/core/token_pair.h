// The common alphabet of two vocabularies: equal tokens of either side get the same small integer.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "core/vocabulary.h"

namespace xtoken {

// What counts as equal text beyond equal bytes. Off by default.
struct CanonicalRules {
    bool fold_space_punctuation = false;  // " ," equals ","
};

// The canonical form of a token's bytes, a suffix of them. Idempotent.
std::string_view canonical_text(std::string_view bytes, CanonicalRules rules);

// Every token of the two vocabularies as a canonical id ("symbol"). Two tokens have the same symbol exactly if they are
// both text with equal canonical bytes, or both special with a common role or equal literals. Symbols below
// `num_texts()` are texts, which may be concatenated; the others are atomic and only equal themselves. The pad role
// makes nothing equal: padding is never aligned.
class TokenPair {
  public:
    TokenPair(const Vocabulary& student, const Vocabulary& teacher, CanonicalRules rules);

    // Symbol of each token id.
    const std::vector<int32_t>& student_symbols() const { return student_; }
    const std::vector<int32_t>& teacher_symbols() const { return teacher_; }
    // Symbol of a token id, which must be in range.
    int32_t student_symbol(int64_t id) const { return student_[static_cast<size_t>(id)]; }
    int32_t teacher_symbol(int64_t id) const { return teacher_[static_cast<size_t>(id)]; }

    int32_t num_texts() const { return static_cast<int32_t>(start_.size()) - 1; }
    bool is_atomic(int32_t symbol) const { return symbol >= num_texts(); }
    // Canonical bytes of a text symbol (may be empty); atomic symbols have none and must not be asked for.
    std::string_view text(int32_t symbol) const {
        const size_t i = static_cast<size_t>(symbol);
        return {arena_.data() + start_[i], start_[i + 1] - start_[i]};
    }

  private:
    std::vector<int32_t> student_, teacher_;  // symbol of each token id
    std::string arena_;                       // texts, one after the other
    std::vector<uint32_t> start_;             // [num_texts + 1] into arena_
};

}  // namespace xtoken
