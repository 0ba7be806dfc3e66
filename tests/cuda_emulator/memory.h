// Memory that kernels may use, and what is known of every byte of it: whether it was written, and who used it last.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace xtoken::emulator {

// When and by whom a byte was used. Times are barrier intervals ("epochs", counted over all blocks and launches),
// within them the number of warp barriers that the thread has passed. Ordered by epoch first.
struct Stamp {
    uint64_t bits = 0;
    static Stamp make(uint32_t epoch, uint32_t clock, uint32_t thread, bool atomic) {
        return {uint64_t{epoch} << 32 | (clock & 0xfffff) << 12 | thread << 1 | uint64_t{atomic}};
    }
    uint32_t epoch() const { return static_cast<uint32_t>(bits >> 32); }
    uint32_t clock() const { return bits >> 12 & 0xfffff; }
    uint32_t thread() const { return bits >> 1 & 0x7ff; }
    bool atomic() const { return bits & 1; }
};

struct Use {
    Stamp stamp;
    const void* code = nullptr;  // return address of the access
};

// The last uses of one byte. Two readers of one interval are kept, of different warps if possible.
struct History {
    Use write, read, other_read;
};

// Those of all bytes of a region; they take no memory until a byte is used.
class Histories {
  public:
    explicit Histories(size_t bytes);
    ~Histories();
    Histories(const Histories&) = delete;
    Histories& operator=(const Histories&) = delete;
    History& operator[](size_t byte) { return first_[byte]; }
    const History* begin() const { return first_; }
    void forget();

  private:
    size_t mapped_;
    History* first_;
};

constexpr unsigned char in_flight = 2;  // an asynchronous copy is to write it

struct Region {
    std::string name;
    char* begin;
    size_t size;
    bool shared;
    std::vector<unsigned char> written;          // [size] 0, 1, or `in_flight`
    Histories history;                           // [size]
    uint64_t bytes_read = 0, bytes_written = 0;  // by all accesses of kernels

    Region(const std::string& name, char* begin, size_t size, bool shared, bool written);
    void forget();  // as new: unwritten, unused, filled with NaN
};

// All regions, by address.
class Regions {
  public:
    // Memory of the caller's; `written` says whether it holds values.
    Region& add(const std::string& name, void* begin, size_t size, bool shared, bool written);
    void remove(const void* begin);
    // The region that holds the address, or nullptr.
    Region* find(const void* address) {
        const auto a = static_cast<const char*>(address);
        if (last_ != nullptr && a >= last_->begin && a < last_->begin + last_->size) return last_;
        return search(a);
    }
    // "'student' + 16", or for an address outside of all regions the nearest one.
    std::string describe(const void* address) const;

  private:
    Region* search(const char* address);
    std::vector<std::unique_ptr<Region>> regions_;  // by begin
    Region* last_ = nullptr;
};

// Memory with wide gaps of inaccessible addresses around it.
void* allocate_guarded(size_t size);
void free_guarded(void* memory);

enum class Access { read, write, atomic, read_only };

// Called on every access of a kernel; `code` is the return address.
void check_access(const void* address, size_t size, Access access, bool aligned, const void* code);

struct Copy;
// The copy's bytes are there; and the end of a launch, because of a copy.
void finish_copy(const Copy& copy);
[[noreturn]] void stop_at_copy(const char* what, const Copy& copy);

}  // namespace xtoken::emulator
