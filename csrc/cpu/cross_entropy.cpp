// Cross-entropy: the loop over rows.
#include "cpu/cross_entropy.h"

#include "cpu/pool.h"

namespace xtoken::cpu {

void cross_entropy(const CrossEntropyParams& params, Level level, int threads) {
    const auto row = XTOKEN_PICK(level, cross_entropy_row);
    run_items(params.student.rows(), threads, [&](int64_t r, Scratch&) { row(params, r); });
}

}  // namespace xtoken::cpu
