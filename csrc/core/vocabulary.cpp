// A vocabulary: the raw bytes of every token, its kind, and the roles that special tokens play.
#include "core/vocabulary.h"

#include <array>

#include "core/error.h"

namespace xtoken {
namespace {

// Reads one code point of well-formed UTF-8 at `i` and moves `i` past it; -1 (and one byte) if it is malformed.
int32_t next_code_point(std::string_view text, size_t& i) {
    const auto at = [&](size_t k) { return static_cast<uint8_t>(text[k]); };
    const uint8_t lead = at(i);
    const int length = lead < 0x80 ? 1 : lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0;
    if (length == 0 || i + static_cast<size_t>(length) > text.size()) return ++i, -1;
    static constexpr std::array<int32_t, 5> kLeadMask = {0, 0x7F, 0x1F, 0x0F, 0x07};
    static constexpr std::array<int32_t, 5> kSmallest = {0, 0, 0x80, 0x800, 0x10000};
    int32_t code = lead & kLeadMask[static_cast<size_t>(length)];
    for (int k = 1; k < length; ++k) {
        const uint8_t byte = at(i + static_cast<size_t>(k));
        if ((byte & 0xC0) != 0x80) return ++i, -1;
        code = (code << 6) | (byte & 0x3F);
    }
    if (code < kSmallest[static_cast<size_t>(length)] || code > 0x10FFFF || (code >= 0xD800 && code <= 0xDFFF)) {
        return ++i, -1;
    }
    i += static_cast<size_t>(length);
    return code;
}

// GPT-2's table from code point to byte, -1 elsewhere: the printable bytes of Latin-1 stand for themselves, the other
// 68 have the code points from 256 on, in byte order.
std::array<int16_t, 512> make_byte_level_table() {
    std::array<int16_t, 512> table;
    table.fill(-1);
    size_t next = 256;
    for (int b = 0; b < 256; ++b) {
        const bool printable = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
        table[printable ? static_cast<size_t>(b) : next++] = static_cast<int16_t>(b);
    }
    return table;
}

}  // namespace

std::string byte_level_bytes(std::string_view piece) {
    static const std::array<int16_t, 512> table = make_byte_level_table();
    std::string bytes;
    for (size_t i = 0; i < piece.size();) {
        const int32_t code = next_code_point(piece, i);
        const int16_t byte = code >= 0 && code < 512 ? table[static_cast<size_t>(code)] : int16_t{-1};
        if (byte < 0) return std::string(piece);  // not in the alphabet: the piece is plain text
        bytes.push_back(static_cast<char>(byte));
    }
    return bytes;
}

std::string byte_level_piece(std::string_view bytes) {
    static const std::array<uint16_t, 256> characters = [] {
        std::array<uint16_t, 256> inverse{};
        const std::array<int16_t, 512> table = make_byte_level_table();
        for (size_t code = 0; code < table.size(); ++code) {
            if (table[code] >= 0) inverse[static_cast<size_t>(table[code])] = static_cast<uint16_t>(code);
        }
        return inverse;
    }();
    std::string piece;
    for (const char byte : bytes) {
        const uint16_t code = characters[static_cast<uint8_t>(byte)];
        if (code < 0x80) {
            piece.push_back(static_cast<char>(code));
        } else {  // all below 0x800: two bytes of UTF-8
            piece.push_back(static_cast<char>(0xC0 | (code >> 6)));
            piece.push_back(static_cast<char>(0x80 | (code & 0x3F)));
        }
    }
    return piece;
}

Vocabulary::Vocabulary(const std::vector<std::string>& tokens, std::vector<TokenKind> kinds, Roles roles)
    : kinds_(std::move(kinds)), roles_(std::move(roles)) {
    if (kinds_.size() != tokens.size()) {
        value_error("kinds: expected ", tokens.size(), " entries, one a token, got ", kinds_.size());
    }
    size_t total = 0;
    for (const std::string& token : tokens) total += token.size();
    arena_.reserve(total);
    start_.reserve(tokens.size() + 1);
    start_.push_back(0);
    for (const std::string& token : tokens) {
        arena_ += token;
        start_.push_back(static_cast<int64_t>(arena_.size()));
    }
    for (const auto& [role, id] : roles_) {
        if (id < 0 || id >= size()) {
            value_error("roles: '", role, "' is token ", id, ", but the vocabulary has ", size(), " tokens");
        }
        if (kind(id) != TokenKind::special) {
            value_error("roles: '", role, "' is token ", id, ", which is not of kind 'special'");
        }
    }
}

}  // namespace xtoken
