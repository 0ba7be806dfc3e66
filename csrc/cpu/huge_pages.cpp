// Memory that is about to be written for the first time, in pages as large as the system has.
#include "cpu/huge_pages.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace xtoken::cpu {

void prefer_huge_pages(void* begin, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const auto first = (reinterpret_cast<uintptr_t>(begin) + huge_page - 1) / huge_page * huge_page;
    const auto last = (reinterpret_cast<uintptr_t>(begin) + bytes) / huge_page * huge_page;
    // It is advice: errors (a kernel built without huge pages) change nothing.
    if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)begin;
    (void)bytes;
#endif
}

void prefer_huge_pages(const Logits& logits) {
    if (logits.data == nullptr || logits.rows() == 0) return;
    const char* end = logits.row(logits.rows() - 1) + logits.width * element_size(logits.type);
    prefer_huge_pages(logits.data, static_cast<size_t>(end - static_cast<char*>(logits.data)));
}

}  // namespace xtoken::cpu
