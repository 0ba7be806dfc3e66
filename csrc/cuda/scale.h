// A gradient times the upstream gradient.
#pragma once

#include "cuda/arguments.h"

namespace xtoken::cuda {

// data[i] *= factor[0]; nothing is read or written if that is 1, as it is after a plain loss.backward().
void scale(void* data, Element type, int64_t size, const float* factor, const Launch& launch);

}  // namespace xtoken::cuda
