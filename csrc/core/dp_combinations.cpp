// The two sequences as the dynamic program sees them: a small alphabet of their own, and every combination in
// it.
#include "core/dp_combinations.h"

#include <algorithm>

namespace xtoken::dp {
namespace {

constexpr uint64_t kBase = 0x9E3779B97F4A7C15;  // odd, so that powers never vanish modulo 2^64

}  // namespace

void Document::assign(const TokenPair& pair, const int32_t* student_symbols, int32_t n, const int32_t* teacher_symbols,
                      int32_t m) {
    for (const Letter& letter : letters_) letter_of_symbol_[letter.symbol] = -1;
    letters_.clear();
    longest_ = {};
    has_empty_ = false;
    read_letters(pair, student_symbols, n, 0, student_);
    read_letters(pair, teacher_symbols, m, 1, teacher_);
    index_texts();
    find_windows(student_, 1);
    find_windows(teacher_, 0);
}

void Document::read_letters(const TokenPair& pair, const int32_t* symbols, int32_t count, int side,
                            Sequence& sequence) {
    sequence.letters.resize(count);
    for (int32_t i = 0; i < count; ++i) {
        const int32_t symbol = symbols[i];
        if (symbol >= static_cast<int32_t>(letter_of_symbol_.size())) letter_of_symbol_.resize(symbol + 1, -1);
        int32_t& letter = letter_of_symbol_[symbol];
        if (letter < 0) {
            Letter fresh{symbol, pair.is_atomic(symbol), {}, {}, 0, 1};
            if (!fresh.atomic) fresh.text = pair.text(symbol);
            for (const char c : fresh.text) {
                fresh.hash = fresh.hash * kBase + static_cast<unsigned char>(c) + 1;
                fresh.shift *= kBase;
            }
            has_empty_ |= !fresh.atomic && fresh.text.empty();
            letters_.push_back(fresh);
            letter = num_letters() - 1;
        }
        letters_[letter].on_side[side] = true;
        longest_[side] = std::max(longest_[side], letters_[letter].text.size());
        sequence.letters[i] = letter;
    }
}

void Document::index_texts() {
    size_t size = 16;
    while (size < 4 * letters_.size()) size *= 2;
    slots_.assign(size, {0, -1});
    for (int32_t letter = 0; letter < num_letters(); ++letter) {
        if (letters_[letter].atomic) continue;
        const uint64_t hash = letters_[letter].hash;
        size_t slot = hash & (size - 1);
        while (slots_[slot].letter >= 0) slot = (slot + 1) & (size - 1);
        slots_[slot] = {static_cast<uint32_t>(hash >> 32), letter};
    }
}

// The letter of `side` that the `count` letters at `run` spell, or -1.
int32_t Document::find_text(uint64_t hash, int side, const int32_t* run, int count) const {
    const auto spells = [&](std::string_view whole) {
        for (int x = 0; x < count; ++x) {
            const std::string_view part = letters_[run[x]].text;
            if (whole.substr(0, part.size()) != part) return false;
            whole.remove_prefix(part.size());
        }
        return whole.empty();
    };
    const size_t mask = slots_.size() - 1;
    for (size_t slot = hash & mask; slots_[slot].letter >= 0; slot = (slot + 1) & mask) {
        if (slots_[slot].tag != static_cast<uint32_t>(hash >> 32)) continue;
        const Letter& found = letters_[slots_[slot].letter];
        if (found.on_side[side] && spells(found.text)) return slots_[slot].letter;
    }
    return -1;
}

void Document::find_windows(Sequence& sequence, int other_side) {
    const int32_t n = sequence.size();
    const int32_t* letters = sequence.letters.data();
    for (int k = 2; k <= kMaxRun; ++k) sequence.spelled[k].assign(n, -1);
    sequence.run_lengths.assign(letters_.size(), 0);
    sequence.windows.clear();
    for (int32_t last = 0; last < n; ++last) {
        if (is_atomic(letters[last])) continue;
        uint64_t hash = letters_[letters[last]].hash, shift = letters_[letters[last]].shift;
        size_t length = letters_[letters[last]].text.size();
        for (int k = 2; k <= kMaxRun; ++k) {
            const int32_t first = last - k + 1;
            if (first < 0 || is_atomic(letters[first])) break;
            const Letter& added = letters_[letters[first]];
            length += added.text.size();
            if (length > longest_[other_side]) break;
            hash += added.hash * shift;
            shift *= added.shift;
            const int32_t letter = find_text(hash, other_side, letters + first, k);
            if (letter < 0) continue;
            sequence.spelled[k][last] = letter;
            sequence.run_lengths[letter] = static_cast<uint8_t>(sequence.run_lengths[letter] | 1 << k);
            sequence.windows.push_back({first, last, letter});
        }
    }
}

}  // namespace xtoken::dp
