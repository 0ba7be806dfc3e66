// KL for one shared tokenizer: the column set's layout, and the loop over rows.
#include "cpu/kd.h"

#include <vector>

#include "cpu/cross_entropy.h"
#include "cpu/huge_pages.h"
#include "cpu/pool.h"

namespace xtoken::cpu {
namespace {

constexpr int64_t lanes = 16;

int64_t padded(int64_t count) { return (count + lanes - 1) / lanes * lanes; }

}  // namespace

int64_t kd_workspace(const KdParams& params) { return 2 * (padded(params.columns.count) + lanes); }

void kd(KdParams params, const int32_t* columns, int64_t count, Level level, int threads) {
    prefer_huge_pages(params.grad);
    std::vector<int32_t> ids;
    std::vector<uint16_t> bits;
    if (columns != nullptr) {
        ids.assign(columns, columns + count);
        ids.resize(padded(count), ids.front());
        bits.assign(padded(params.student.width) / lanes, 0);
        for (const int32_t id : ids) bits[id / lanes] |= static_cast<uint16_t>(1u << id % lanes);
        params.columns = {ids.data(), bits.data(), count};
    }
    const CrossEntropyParams labels{params.student, params.grad, params.labels, params.lowest, false};
    std::vector<int64_t> chunk_of(params.student.rows(), -1);
    for (int64_t k = 0; k < params.chunks; ++k) chunk_of[params.student_rows.start[k]] = k;
    const auto chunk = XTOKEN_PICK(level, kd_chunk);
    const auto other = XTOKEN_PICK(level, cross_entropy_row);
    run_items(params.student.rows(), threads, [&](int64_t r, Scratch& scratch) {
        if (chunk_of[r] < 0) return other(labels, r);
        chunk(params, chunk_of[r], scratch.take<float>(kd_workspace(params)));
    });
}

}  // namespace xtoken::cpu
