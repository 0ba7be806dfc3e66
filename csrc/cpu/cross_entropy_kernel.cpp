// Cross-entropy of one row. A label whose logit is below `lowest` keeps its gradient.
#include "cpu/cross_entropy.h"
#include "cpu/rows.h"

namespace xtoken::cpu::XTOKEN_LEVEL {

void cross_entropy_row(const CrossEntropyParams& params, int64_t r) {
    const int64_t n = params.student.width;
    const bool wanted = params.grad.data != nullptr;
    const Target target{wanted ? params.grad.row(r) : nullptr, n, params.grad.width};
    typed(params.student.type, params.student.row(r), [&](const auto* z) {
        using T = typename Element_of<decltype(*z)>::type;
        if (params.labels.of(r) < 0) {
            if (params.labels.ids != nullptr) params.labels.losses[r] = 0;
            if (wanted && !params.add) write_row(target, z, [](int64_t) { return broadcast(0.0f); });
            return;
        }
        const Normaliser one = exponentials(WholeRow<T>{z}, n, params.lowest, 1.0, [](int64_t, Floats) {});
        const LabelTerm term = label_term(params.labels, r, z, one);
        if (!wanted) return;
        const ElementExponential<T> exp{one.exp};
        const Floats zero = broadcast(0.0f), weight = broadcast(term.weight);
        if (!params.add) {
            write_row(target, z,
                      [&](int64_t i) { return term.without_label(i, exp(load(z + i, n - i, zero)) * weight); });
            return;
        }
        T* grad = static_cast<T*>(target.row);
        for (int64_t i = 0; i < n; i += lanes) {
            const Floats g = fma(exp(load(z + i, n - i, zero)), weight, load(grad + i, n - i, zero));
            store(grad + i, n - i, term.without_label(i, g));
        }
    });
}

}  // namespace xtoken::cpu::XTOKEN_LEVEL
