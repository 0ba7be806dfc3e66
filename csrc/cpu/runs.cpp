// Where the partners of 16 rows follow each other.
#include "cpu/runs.h"

#include <cstddef>

#include "cpu/lanes.h"

namespace xtoken::cpu {

std::vector<int32_t> find_runs(const std::vector<int32_t>& partners, const std::vector<uint16_t>& paired_bits) {
    std::vector<int32_t> runs(paired_bits.size(), -1);
    for (size_t k = 0; k < runs.size(); ++k) {
        const int32_t* partner = partners.data() + lanes * k;
        const uint32_t paired = paired_bits[k];
        int32_t begin = 0;
        bool run = true;
        for (int32_t i = lanes - 1; i >= 0; --i) {
            if ((paired >> i & 1u) != 0) begin = partner[i] - i;
        }
        for (int32_t i = 0; i < lanes; ++i) run = run && ((paired >> i & 1u) == 0 || partner[i] - i == begin);
        if (run && begin >= 0) runs[k] = begin;
    }
    return runs;
}

}  // namespace xtoken::cpu
