// Element types of logits in memory.
#pragma once

#include <cstdint>

namespace xtoken::cpu {

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

enum class Element { float32, bfloat16, float16 };

constexpr int64_t element_size(Element type) { return type == Element::float32 ? 4 : 2; }

}  // namespace xtoken::cpu
