// Elements of logits that C++ has no type for.
#pragma once

#include <cstdint>

namespace xtoken::cpu {

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

}  // namespace xtoken::cpu
