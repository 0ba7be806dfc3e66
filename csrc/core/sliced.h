// Lists of unequal length side by side, as vector units and warps read them: sliced ELLPACK, sorted (SELL-C-sigma).
#pragma once

#include <cstdint>
#include <vector>

namespace xtoken {

// Lists are sorted by length, longest first, equals in their order; `lanes` of them are a slice, which is as long as
// its first. Entry i of lane l of slice k is at lanes * (start[k] + i) + l. The lists that are longer than `longest`
// come first, each with a slice of its own (`shared`), dealt out to its lanes: entry i is at lanes * start[k] + i.
struct SlicedLists {
    int64_t lanes, shared;
    std::vector<int64_t> start;  // [slices + 1]
    std::vector<int32_t> place;  // [lists] by the given number: where the list is in the order

    SlicedLists(const std::vector<int32_t>& counts, int64_t lanes, int64_t longest = INT32_MAX);

    int64_t lists() const { return static_cast<int64_t>(place.size()); }
    int64_t slices() const { return static_cast<int64_t>(start.size()) - 1; }
    int64_t size() const { return lanes * start.back(); }

    // Calls put(at, i) with where each entry i of a list is.
    template <typename Put>
    void each_entry(int64_t list, int64_t count, Put put) const {
        const int64_t at = place[list], own = at - shared;
        const bool is_shared = own < 0;
        const int64_t first = lanes * start[is_shared ? at : shared + own / lanes] + (is_shared ? 0 : own % lanes);
        const int64_t step = is_shared ? 1 : lanes;
        for (int64_t i = 0; i < count; ++i) put(first + step * i, i);
    }
};

}  // namespace xtoken
