// The largest logits of columns.
#include "cpu/columns.h"

#include "cpu/rows.h"

namespace xtoken::cpu::XTOKEN_LEVEL {

void column_maxima(const Logits& logits, int64_t begin, int64_t end, float* maxima) {
    const Floats least = broadcast(-INFINITY);
    for (int64_t i = begin; i < end; i += lanes) store(maxima + i, end - i, least);
    for (int64_t r = 0; r < logits.rows(); ++r) {
        typed(logits.type, logits.row(r), [&](const auto* row) {
            using T = typename Element_of<decltype(*row)>::type;
            const T* following = reinterpret_cast<const T*>(logits.row(r + 1 < logits.rows() ? r + 1 : r));
            for (int64_t i = begin; i < end; i += lanes) {
                prefetch(following + i);
                const Floats x = load(row + i, end - i, least), known = load(maxima + i, end - i, least);
                // max gives its second where one is NaN: a NaN comes in by the selection, and stays
                store(maxima + i, end - i, select(equal(x, x), max(x, known), x));
            }
        });
    }
}

}  // namespace xtoken::cpu::XTOKEN_LEVEL
