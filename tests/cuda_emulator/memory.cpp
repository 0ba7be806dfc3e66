// Regions of memory, and the look-up of addresses in them.
#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <new>
#include <stdexcept>

namespace xtoken::emulator {
namespace {

constexpr size_t page = 4096, gap = size_t{1} << 20;
std::map<void*, std::pair<void*, size_t>> mappings;  // memory -> what was mapped for it

size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

}  // namespace

Histories::Histories(size_t bytes) : mapped_(round_up(std::max(bytes, size_t{1}) * sizeof(History), page)) {
    void* zeros = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (zeros == MAP_FAILED) throw std::bad_alloc();
    first_ = static_cast<History*>(zeros);
}

Histories::~Histories() { munmap(first_, mapped_); }

void Histories::forget() { madvise(first_, mapped_, MADV_DONTNEED); }  // zeros again

Region::Region(const std::string& name, char* begin, size_t size, bool shared, bool written)
    : name(name), begin(begin), size(size), shared(shared), written(size, written), history(size) {}

void Region::forget() {
    std::fill(written.begin(), written.end(), 0);
    history.forget();
    std::memset(begin, 0xff, size);
}

Region& Regions::add(const std::string& name, void* begin, size_t size, bool shared, bool written) {
    auto region = std::make_unique<Region>(name, static_cast<char*>(begin), size, shared, written);
    const auto place = std::upper_bound(regions_.begin(), regions_.end(), region->begin,
                                        [](const char* a, const auto& other) { return a < other->begin; });
    const bool overlaps = (place != regions_.end() && region->begin + size > (*place)->begin) ||
                          (place != regions_.begin() && place[-1]->begin + place[-1]->size > region->begin);
    if (overlaps) throw std::invalid_argument("emulator: '" + name + "' overlaps memory that is registered already");
    return **regions_.insert(place, std::move(region));
}

void Regions::remove(const void* begin) {
    const auto found = std::find_if(regions_.begin(), regions_.end(), [&](const auto& r) { return r->begin == begin; });
    if (found == regions_.end()) throw std::invalid_argument("emulator: no memory is registered at this address");
    last_ = nullptr;
    regions_.erase(found);
}

Region* Regions::search(const char* address) {
    const auto next = std::upper_bound(regions_.begin(), regions_.end(), address,
                                       [](const char* a, const auto& region) { return a < region->begin; });
    if (next == regions_.begin() || address >= next[-1]->begin + next[-1]->size) return nullptr;
    return last_ = next[-1].get();
}

std::string Regions::describe(const void* address) const {
    const auto a = static_cast<const char*>(address);
    std::string nearest;
    size_t best = gap;
    for (const auto& region : regions_) {
        const std::string name = (region->shared ? "shared '" : "'") + region->name + "'";
        if (a >= region->begin && a < region->begin + region->size) {
            return name + " + " + std::to_string(a - region->begin);
        }
        const size_t distance = a < region->begin ? region->begin - a : a - (region->begin + region->size);
        if (distance >= best) continue;
        best = distance;
        nearest = std::to_string(distance) + (a < region->begin ? " bytes before " : " bytes past the end of ") + name +
                  " (" + std::to_string(region->size) + " bytes)";
    }
    if (!nearest.empty()) return nearest;
    return address == nullptr ? "a null pointer" : "an address far from all buffers";
}

void* allocate_guarded(size_t size) {
    // The end of the memory is as near to the gap as an alignment of 256 bytes, that of cudaMalloc, allows.
    const size_t inside = round_up(std::max(size, size_t{1}), 256), mapped = round_up(inside, page) + 2 * gap;
    void* mapping = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    char* first = static_cast<char*>(mapping) + gap;
    mprotect(first, round_up(inside, page), PROT_READ | PROT_WRITE);
    char* memory = first + round_up(inside, page) - inside;
    mappings[memory] = {mapping, mapped};
    return memory;
}

void free_guarded(void* memory) {
    const auto found = mappings.find(memory);
    if (found == mappings.end()) throw std::invalid_argument("emulator: this memory was not allocated here");
    munmap(found->second.first, found->second.second);
    mappings.erase(found);
}

}  // namespace xtoken::emulator
