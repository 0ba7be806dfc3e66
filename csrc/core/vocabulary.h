// A vocabulary: the raw bytes of every token, its kind, and the roles that special tokens play.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

namespace xtoken {

enum class TokenKind : uint8_t {
    normal = 0,   // text
    byte = 1,     // one byte of text, produced only where no normal token fits, such as <0xE4>
    special = 2,  // stands for no text: bos, eos, chat markers
    unused = 3,   // an id that no text produces: a hole in the numbering, a reserved slot
};

// The bytes of a token as GPT-2 writes it, each byte as one printable character; a piece with another character is
// text.
std::string byte_level_bytes(std::string_view piece);

// The inverse: the piece that GPT-2's table writes for these bytes.
std::string byte_level_piece(std::string_view bytes);

class Vocabulary {
  public:
    using Roles = std::vector<std::pair<std::string, int32_t>>;  // (role, token id), one entry a role

    // Throws Error if the sizes differ, or a role's id is out of range or is not special.
    Vocabulary(const std::vector<std::string>& tokens, std::vector<TokenKind> kinds, Roles roles);

    int32_t size() const { return static_cast<int32_t>(kinds_.size()); }
    TokenKind kind(int32_t id) const { return kinds_[static_cast<size_t>(id)]; }
    const Roles& roles() const { return roles_; }
    std::string_view bytes(int32_t id) const {
        const size_t i = static_cast<size_t>(id);
        return {arena_.data() + start_[i], static_cast<size_t>(start_[i + 1] - start_[i])};
    }
    // Whether the token stands for text (normal or byte).
    bool is_text(int32_t id) const { return kind(id) == TokenKind::normal || kind(id) == TokenKind::byte; }

    // A total order that is the same in every run; vocabularies of which neither is less are equal.
    bool operator<(const Vocabulary& other) const {
        return std::tie(start_, arena_, kinds_, roles_) <
               std::tie(other.start_, other.arena_, other.kinds_, other.roles_);
    }

  private:
    std::string arena_;           // all tokens, one after the other
    std::vector<int64_t> start_;  // [size + 1] into arena_
    std::vector<TokenKind> kinds_;
    Roles roles_;
};

}  // namespace xtoken
