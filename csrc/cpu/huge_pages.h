// Memory that is about to be written for the first time, in pages as large as the system has.
#pragma once

#include <cstddef>

#include "launch/arguments.h"

namespace xtoken::cpu {

// Size and alignment of the pages that are asked for.
constexpr size_t huge_page = size_t{2} << 20;

// Asks for huge pages in [begin, begin + bytes). The memory of a fresh gradient is committed at its first write; page
// faults of 4 kB cost more time than a loss. Only huge pages that lie entirely inside the range are affected, and only
// those not in use yet. Without support, nothing happens.
void prefer_huge_pages(void* begin, size_t bytes);

// The same for all elements of the gradient of `logits`; nothing if it is null.
void prefer_huge_pages(const Logits& logits);

}  // namespace xtoken::cpu
