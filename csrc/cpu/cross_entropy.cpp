// Cross-entropy: the loop over rows. One thread computes a row: results do not depend on how many there are.
#include "cpu/cross_entropy.h"

#include "cpu/pool.h"

namespace xtoken::cpu {
namespace {

void cross_entropy(const CrossEntropyParams& params, const Launch& launch) {
    const auto row = XTOKEN_PICK(launch.level, cross_entropy_row);
    run_items(params.student.rows(), launch.threads, [&](int64_t r, Scratch&) { row(params, r); });
}

const Launcher launcher("cross_entropy", &cross_entropy);

}  // namespace
}  // namespace xtoken::cpu
