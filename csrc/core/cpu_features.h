// The instruction sets of the processor that this program runs on.
#pragma once

#include <string>
#include <vector>

namespace xtoken {

// Names such as "avx2" or "avx512f", in a fixed order; empty on processors that are not x86-64.
std::vector<std::string> cpu_features();

}  // namespace xtoken
