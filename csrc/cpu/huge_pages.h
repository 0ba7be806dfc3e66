// Memory that is about to be written for the first time, in pages as large as the system has.
#pragma once

#include <cstddef>

#include "launch/arguments.h"

namespace xtoken::cpu {

// Size and alignment of the pages that are asked for.
constexpr size_t huge_page = size_t{2} << 20;

// Asks for huge pages in [begin, begin + bytes). The system gives out the memory of a fresh gradient at its first
// write; in pages of 4 kB that costs more time than a loss. Only the huge pages that lie inside the range whole are
// affected, and only those not in use yet. Without support, nothing happens.
void prefer_huge_pages(void* begin, size_t bytes);

// The same for all elements of the gradient of `logits`; nothing if it is null.
void prefer_huge_pages(const Logits& logits);

}  // namespace xtoken::cpu
