// Vectors of the CPU kernels have 16 floats; arrays for them are padded to whole vectors.
#pragma once

#include <cstdint>

namespace xtoken::cpu {

constexpr int64_t lanes = 16;

// static: a copy for every file, since files are compiled for different processors
static constexpr int64_t padded(int64_t count) { return (count + lanes - 1) / lanes * lanes; }

}  // namespace xtoken::cpu
