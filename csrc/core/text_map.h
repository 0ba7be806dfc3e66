// A map from texts to integers: one table, no node for each entry.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string_view>
#include <utility>
#include <vector>

namespace xtoken {

// Views its texts, which must outlive it. Entries stay in the order in which they came.
class TextMap {
  public:
    // For up to `most` texts.
    explicit TextMap(size_t most) {
        size_t size = 2;
        while (size < 2 * most) size *= 2;
        slots_.resize(size);
    }

    // The value of a text; if it has none, it gets `value` first.
    int32_t& at(std::string_view text, int32_t value) {
        Slot& slot = slots_[place(text)];
        if (slot.entry == 0) {
            entries_.emplace_back(text, value);
            slot = {hash(text), static_cast<uint32_t>(entries_.size())};
        }
        return entries_[slot.entry - 1].second;
    }

    // The value of a text, or nullptr.
    const int32_t* find(std::string_view text) const {
        const Slot& slot = slots_[place(text)];
        return slot.entry == 0 ? nullptr : &entries_[slot.entry - 1].second;
    }

    const std::vector<std::pair<std::string_view, int32_t>>& entries() const { return entries_; }

  private:
    struct Slot {
        uint32_t hash = 0;
        uint32_t entry = 0;  // its place in entries_, from 1; 0: free
    };

    static uint32_t hash(std::string_view text) { return static_cast<uint32_t>(std::hash<std::string_view>{}(text)); }
    // Where the text is, or may come. At least half of the slots are free.
    size_t place(std::string_view text) const {
        const uint32_t wanted = hash(text);
        for (size_t i = wanted;; ++i) {
            const Slot& slot = slots_[i & (slots_.size() - 1)];
            if (slot.entry == 0 || (slot.hash == wanted && entries_[slot.entry - 1].first == text)) {
                return i & (slots_.size() - 1);
            }
        }
    }

    std::vector<Slot> slots_;
    std::vector<std::pair<std::string_view, int32_t>> entries_;
};

}  // namespace xtoken
