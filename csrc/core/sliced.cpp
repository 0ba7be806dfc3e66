// Lists of unequal length side by side.
#include "core/sliced.h"

#include <algorithm>

namespace xtoken {

SlicedLists::SlicedLists(const std::vector<int32_t>& counts, int64_t given_lanes, int64_t own_slice_above)
    : lanes(given_lanes), shared(0), start{0}, place(counts.size()) {
    int32_t longest = 0;
    for (const int32_t count : counts) longest = std::max(longest, count);
    // A sort by counting: before[n] lists are longer than longest - n.
    std::vector<int32_t> before(static_cast<size_t>(longest) + 2, 0);
    for (const int32_t count : counts) ++before[longest - count + 1];
    for (size_t n = 1; n < before.size(); ++n) before[n] += before[n - 1];
    if (longest > own_slice_above) shared = before[longest - own_slice_above];
    for (size_t i = 0; i < counts.size(); ++i) place[i] = before[longest - counts[i]]++;

    const int64_t slices = shared + (lists() - shared + lanes - 1) / lanes;
    start.resize(slices + 1, 0);
    for (size_t i = 0; i < counts.size(); ++i) {
        const int64_t own = place[i] - shared;
        if (own < 0) {
            start[place[i] + 1] = (counts[i] + lanes - 1) / lanes;
        } else if (own % lanes == 0) {
            start[shared + own / lanes + 1] = counts[i];
        }
    }
    for (int64_t k = 0; k < slices; ++k) start[k + 1] += start[k];
}

}  // namespace xtoken
