// The common alphabet of two vocabularies: equal tokens of either side get the same small integer.
#include "core/token_pair.h"

#include <limits>
#include <numeric>
#include <unordered_map>

#include "core/error.h"
#include "core/text_map.h"

namespace xtoken {
namespace {

constexpr std::string_view kPadRole = "pad";

bool is_ascii_punctuation(char c) {
    return (c >= 0x21 && c <= 0x2F) || (c >= 0x3A && c <= 0x40) || (c >= 0x5B && c <= 0x60) || (c >= 0x7B && c <= 0x7E);
}

// Union-find over the ids of both vocabularies, the teacher's after the student's.
class Classes {
  public:
    explicit Classes(size_t count) : parent_(count) { std::iota(parent_.begin(), parent_.end(), 0); }
    size_t find(size_t x) {
        while (parent_[x] != x) x = parent_[x] = parent_[parent_[x]];
        return x;
    }
    void join(size_t a, size_t b) { parent_[find(b)] = find(a); }

  private:
    std::vector<size_t> parent_;
};

}  // namespace

std::string_view canonical_text(std::string_view bytes, CanonicalRules rules) {
    if (!rules.fold_space_punctuation || bytes.size() < 2 || bytes[0] != ' ') return bytes;
    for (size_t i = 1; i < bytes.size(); ++i) {
        if (!is_ascii_punctuation(bytes[i])) return bytes;
    }
    return bytes.substr(1);
}

TokenPair::TokenPair(const Vocabulary& student, const Vocabulary& teacher, CanonicalRules rules) {
    start_.push_back(0);
    TextMap texts(static_cast<size_t>(student.size()) + static_cast<size_t>(teacher.size()));
    const auto intern_texts = [&](const Vocabulary& vocabulary, std::vector<int32_t>& symbols) {
        symbols.assign(static_cast<size_t>(vocabulary.size()), -1);
        for (int32_t id = 0; id < vocabulary.size(); ++id) {
            if (!vocabulary.is_text(id)) continue;
            const std::string_view text = canonical_text(vocabulary.bytes(id), rules);
            const int32_t symbol = texts.at(text, num_texts());
            if (symbol == num_texts()) {
                arena_ += text;
                if (arena_.size() > std::numeric_limits<uint32_t>::max()) value_error("vocabulary: over 4 GiB of text");
                start_.push_back(static_cast<uint32_t>(arena_.size()));
            }
            symbols[static_cast<size_t>(id)] = symbol;
        }
    };
    intern_texts(student, student_);
    intern_texts(teacher, teacher_);

    // Atomic tokens: one class for each set of special tokens linked by a role or a literal across the two sides.
    Classes classes(student_.size() + teacher_.size());
    const size_t teacher_base = student_.size();
    for (const auto& [role, student_id] : student.roles()) {
        if (role == kPadRole) continue;
        for (const auto& [other, teacher_id] : teacher.roles()) {
            if (role == other)
                classes.join(static_cast<size_t>(student_id), teacher_base + static_cast<size_t>(teacher_id));
        }
    }
    std::unordered_map<std::string_view, size_t> literals;
    for (int32_t id = 0; id < student.size(); ++id) {
        if (student.kind(id) == TokenKind::special) literals.emplace(student.bytes(id), static_cast<size_t>(id));
    }
    for (int32_t id = 0; id < teacher.size(); ++id) {
        if (teacher.kind(id) != TokenKind::special) continue;
        const auto found = literals.find(teacher.bytes(id));
        if (found != literals.end()) classes.join(found->second, teacher_base + static_cast<size_t>(id));
    }
    std::unordered_map<size_t, int32_t> atomic;
    const auto number_atomic = [&](std::vector<int32_t>& symbols, size_t base) {
        for (size_t id = 0; id < symbols.size(); ++id) {
            if (symbols[id] >= 0) continue;
            const int32_t next = num_texts() + static_cast<int32_t>(atomic.size());
            symbols[id] = atomic.emplace(classes.find(base + id), next).first->second;
        }
    };
    number_atomic(student_, 0);
    number_atomic(teacher_, teacher_base);
}

}  // namespace xtoken
