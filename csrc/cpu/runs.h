// Where the partners of 16 rows follow each other, one load does the work of a gather.
#pragma once

#include <cstdint>
#include <vector>

namespace xtoken::cpu {

// For each 16 rows the partner of the first, if those of the others that are paired follow in order; else -1.
std::vector<int32_t> find_runs(const std::vector<int32_t>& partners, const std::vector<uint16_t>& paired_bits);

}  // namespace xtoken::cpu
