// The columns with the largest logits: maxima in blocks of columns, then a selection without a sort.
#include "cpu/columns.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

#include "core/error.h"
#include "cpu/pool.h"

namespace xtoken::cpu {
namespace {

// Columns of one item: their maxima stay in the L1 cache.
constexpr int64_t block = 2048;
constexpr int bin_bits = 12;

// Ordered as the number is; equal for both zeros; NaN is the largest.
uint32_t sort_key(float x) {
    if (x != x) return UINT32_MAX;
    x += 0.0f;
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits ^ ((bits >> 31) != 0 ? 0xFFFFFFFFu : 0x80000000u);
}

// The count-th largest key.
uint32_t threshold_of(const std::vector<uint32_t>& keys, int64_t count) {
    std::vector<int64_t> size(size_t{1} << bin_bits, 0);
    for (const uint32_t key : keys) ++size[key >> (32 - bin_bits)];
    uint32_t bin = 1u << bin_bits;
    while (size[--bin] < count) count -= size[bin];
    std::vector<uint32_t> inside;
    for (const uint32_t key : keys) {
        if (key >> (32 - bin_bits) == bin) inside.push_back(key);
    }
    std::nth_element(inside.begin(), inside.begin() + (count - 1), inside.end(), std::greater<>());
    return inside[count - 1];
}

void largest_columns(const ColumnsParams& params, const Launch& launch) {
    const Logits& logits = params.logits;
    const int64_t width = logits.width, count = params.count;
    if (count < 1 || count > width) value_error("count: expected 1 ... ", width, ", got ", count);
    const auto maxima_of = XTOKEN_PICK(launch.level, column_maxima);
    std::vector<float> maxima(width);
    run_items((width + block - 1) / block, launch.threads, [&](int64_t item, Scratch&) {
        maxima_of(logits, item * block, std::min(width, (item + 1) * block), maxima.data());
    });
    std::vector<uint32_t> keys(width);
    std::transform(maxima.begin(), maxima.end(), keys.begin(), sort_key);
    const uint32_t threshold = threshold_of(keys, count);
    int64_t equal = count - std::count_if(keys.begin(), keys.end(), [=](uint32_t key) { return key > threshold; });
    int64_t* ids = params.ids;
    for (int64_t id = 0; id < width; ++id) {
        if (keys[id] > threshold || (keys[id] == threshold && equal-- > 0)) *ids++ = id;
    }
}

const Launcher launcher("largest_columns", &largest_columns);

}  // namespace
}  // namespace xtoken::cpu
