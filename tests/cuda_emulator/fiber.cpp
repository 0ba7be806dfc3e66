// Stacks and context switches of fibers.
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if !defined(__x86_64__) && !defined(XTOKEN_EMULATOR_UCONTEXT)
#define XTOKEN_EMULATOR_UCONTEXT
#endif
#ifdef XTOKEN_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

namespace xtoken::emulator {
namespace {
constexpr size_t guard_size = 4096;
}

Fiber::Fiber() {
    void* memory =
        mmap(nullptr, stack_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stack_ = static_cast<char*>(memory);
    mprotect(stack_, guard_size, PROT_NONE);
}

#ifndef XTOKEN_EMULATOR_UCONTEXT

// Saves the registers that a called function must preserve, and the stack pointer; loads the other's.
asm(R"(
.text
.type xtoken_emulator_switch, @function
xtoken_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.type xtoken_emulator_enter, @function
xtoken_emulator_enter:
    movq %r12, %rdi
    callq *%rbx
    ud2
)");
extern "C" void xtoken_emulator_switch(void** from, void* to) __attribute__((visibility("hidden")));
extern "C" void xtoken_emulator_enter() __attribute__((visibility("hidden")));

Fiber::~Fiber() { munmap(stack_, stack_size); }

void Fiber::start(void (*function)(void*), void* argument) {
    auto* top = reinterpret_cast<uintptr_t*>(stack_ + stack_size);
    *--top = reinterpret_cast<uintptr_t>(&xtoken_emulator_enter);
    *--top = 0;                                      // rbp
    *--top = reinterpret_cast<uintptr_t>(function);  // rbx
    *--top = reinterpret_cast<uintptr_t>(argument);  // r12
    top -= 3;                                        // r13, r14, r15
    context_ = top;
}

void Fiber::change(void*& from, void* to) { xtoken_emulator_switch(&from, to); }

#else

Fiber::~Fiber() {
    delete static_cast<ucontext_t*>(context_);
    munmap(stack_, stack_size);
}

void Fiber::start(void (*function)(void*), void* argument) {
    if (context_ == nullptr) context_ = new ucontext_t;
    auto* context = static_cast<ucontext_t*>(context_);
    getcontext(context);
    context->uc_stack.ss_sp = stack_;
    context->uc_stack.ss_size = stack_size;
    context->uc_link = nullptr;
    // makecontext passes ints; a pointer takes two.
    const auto enter = [](unsigned f_high, unsigned f_low, unsigned a_high, unsigned a_low) {
        const auto pointer = [](uintptr_t high, uintptr_t low) { return high << 32 | low; };
        reinterpret_cast<void (*)(void*)>(pointer(f_high, f_low))(reinterpret_cast<void*>(pointer(a_high, a_low)));
    };
    const auto f = reinterpret_cast<uintptr_t>(function), a = reinterpret_cast<uintptr_t>(argument);
    makecontext(context, reinterpret_cast<void (*)()>(+enter), 4, unsigned(f >> 32), unsigned(f), unsigned(a >> 32),
                unsigned(a));
}

void Fiber::change(void*& from, void* to) {
    if (from == nullptr) from = new ucontext_t;
    swapcontext(static_cast<ucontext_t*>(from), static_cast<ucontext_t*>(to));
}

#endif

}  // namespace xtoken::emulator
