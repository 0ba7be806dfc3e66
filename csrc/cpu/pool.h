// Threads and scratch memory that persist between calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

namespace xtoken::cpu {

// Memory of one thread: a stack of aligned blocks, all freed at once when the next item begins. Grows to what an item
// needs and keeps it.
class Scratch {
  public:
    static constexpr size_t alignment = 64;

    // `count` uninitialised elements at a multiple of `alignment`; valid until `clear`.
    template <typename T>
    T* take(int64_t count) {
        return static_cast<T*>(take_bytes(static_cast<size_t>(count) * sizeof(T)));
    }
    void clear();

  private:
    struct Block {
        std::unique_ptr<char[]> memory;
        char* begin = nullptr;
        size_t size = 0;
    };
    void* take_bytes(size_t bytes);

    Block blocks_[16];
    size_t used_ = 0;
};

// Calls body(item, scratch) for every item in [0, count) on up to `threads` threads, the caller being one. Items are
// handed out in order from a shared counter; which thread gets an item is not determined, so results must not depend on
// it. The scratch is cleared before each item. Threads wait between calls; calls from several threads do not share any;
// after a fork the child starts its own. The first exception is rethrown once all threads have stopped.
void run_items(int64_t count, int threads, const std::function<void(int64_t, Scratch&)>& body);

}  // namespace xtoken::cpu
