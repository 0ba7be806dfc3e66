// KL for one shared tokenizer on the CPU: the column set's layout, and the loop over chunks.
#include <vector>

#include "cpu/chunk_loop.h"
#include "cpu/lanes.h"
#include "losses/kd/params.h"

namespace xtoken::cpu {
namespace {

void kd(const KdParams& params, const Launch& launch) {
    KdChunks chunks{params, {}};
    std::vector<int32_t> ids;
    std::vector<uint16_t> bits;
    if (const auto [columns, count] = params.columns; columns != nullptr) {
        ids.assign(columns, columns + count);
        ids.resize(padded(count), ids.front());
        bits.assign(padded(params.student.width) / lanes, 0);
        for (const int32_t id : ids) bits[id / lanes] |= static_cast<uint16_t>(1u << id % lanes);
        chunks.set = {ids.data(), bits.data(), count};
    }
    const int64_t workspace = 2 * (padded(chunks.set.count) + lanes);
    const auto chunk = XTOKEN_PICK(launch.level, kd_chunk);
    ChunkLoop(params, params.labels).run(launch, [&](int64_t, int64_t begin, int64_t end, Scratch& scratch) {
        float* memory = scratch.take<float>(workspace);
        for (int64_t k = begin; k < end; ++k) chunk(chunks, k, memory);
    });
}

const Launcher launcher("kd", &kd);

}  // namespace
}  // namespace xtoken::cpu
