// A fiber: a stack and a saved context; switching costs some nanoseconds.
#pragma once

#include <cstddef>

namespace xtoken::emulator {

class Fiber {
  public:
    Fiber();
    ~Fiber();
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    // Makes the next switch to this fiber call function(argument), which must not return.
    void start(void (*function)(void*), void* argument);
    bool owns(const void* address) const { return address >= stack_ && address < stack_ + stack_size; }

    // Leaves `from` (whose context is saved) for `to`.
    static void change(void*& from, void* to);
    void*& context() { return context_; }

    static constexpr size_t stack_size = size_t{1} << 17;

  private:
    char* stack_;  // its lowest page is not accessible
    void* context_ = nullptr;
};

}  // namespace xtoken::emulator
