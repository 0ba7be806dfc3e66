// The emulated device: the running launch, its threads, and the order in which they run.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "emulator.h"
#include "fiber.h"
#include "memory.h"
#include "report.h"

namespace xtoken::emulator {

// The order in which runnable threads run; each runs until it waits for others.
enum class Order {
    forward,    // by rising number, all warps evenly
    reverse,    // by falling number; blocks too
    random,     // drawn anew at each switch; blocks shuffled
    one_ahead,  // one warp, drawn, runs as far as it can before any other
};

struct CallSite {
    const char* file = nullptr;
    int line = 0;
    bool operator==(const CallSite& other) const;
};

// Lanes of a warp that meet.
struct Meeting {
    WarpCall call;
    unsigned mask;  // whom it waits for
    unsigned arrived = 0;
    unsigned left = 0;  // lanes that have taken the values
    CallSite site;
    uint64_t value[32];
};

// An asynchronous copy that its thread has not waited for.
struct Copy {
    char* to;
    const char* from;
    size_t size;
    uint32_t group;
    const void* code;
    std::vector<Stamp> source;  // [size] who wrote it last when the copy began
};

struct Thread {
    Fiber fiber;
    uint3 index;
    uint32_t number, warp, lane;
    enum class State { ready, at_barrier, in_warp, exited } state;
    CallSite waits_at;
    // Its own clock (counts warp barriers in this epoch), and what it knows of the clocks of its warp.
    uint32_t clock;
    uint32_t seen[32];
    bool fenced;  // has executed __threadfence in this block
    std::deque<Copy> copies;
    uint32_t groups;  // of copies, that it has committed
};

class Machine {
  public:
    cudaError_t run(const Launch& launch);

    BarrierResult block_barrier(int predicate, CallSite site);
    WarpValues warp_exchange(WarpCall call, unsigned mask, uint64_t value, CallSite site);
    void* shared_variable(const void* key, const char* name, size_t size, size_t alignment);
    void* dynamic_shared();

    // Whether the access of the stamp happened before (in the memory model) what the current thread does now.
    bool happened_before(Stamp stamp) const;
    Stamp now(bool atomic) const { return Stamp::make(epoch_, current->clock, current->number, atomic); }
    // Of the running launch, if the stamp is of it.
    bool in_this_launch(Stamp stamp) const { return stamp.epoch() >= first_epoch_; }
    // "thread (3,0,0) of block (1,0,0)"
    std::string name_of(Stamp stamp) const;
    std::string name_of_current() const { return name_of(now(false)); }
    // Synchronisation between blocks: a fence and then an atomic releases; an atomic on the same address acquires.
    void publish_and_receive(const void* address);

    // Ends the launch; the calling thread never continues.
    [[noreturn]] void stop();
    [[noreturn]] void fail(const std::string& what, CallSite site);

    Regions regions;
    Report report;
    Thread* current = nullptr;  // null outside of launches
    const Launch* launch = nullptr;
    uint3 block_index;
    Order order = Order::forward;
    uint32_t seed = 0;
    int device = 0, launched_on = -1;             // the current device, and that of the last launch
    std::map<const void*, size_t> dynamic_limit;  // by kernel, from cudaFuncSetAttribute

  private:
    void run_block(uint64_t block);
    static void thread_main(void* thread);
    void leave_thread();
    void change_thread();
    Thread* choose();
    Thread* next_ready(uint32_t from, bool upwards);
    void set_state(Thread& thread, Thread::State state);
    void finish_barrier();
    void finish_meeting(Meeting& meeting, Thread* first);
    [[noreturn]] void report_deadlock();

    std::vector<std::unique_ptr<Thread>> threads_;  // kept from launch to launch
    uint32_t live_ = 0, size_ = 0;                  // of the block
    std::vector<uint64_t> ready_;                   // one bit a thread
    void* main_context_ = nullptr;
    std::mt19937 random_;
    uint32_t warp_ahead_ = 0;
    uint3 index_of(uint64_t block) const;

    uint32_t epoch_ = 1, first_epoch_ = 1;
    std::vector<std::pair<uint32_t, uint64_t>> block_epochs_;  // first epoch, block; of this launch
    std::map<uint32_t, uint32_t> received_;                    // of the block: first epoch of another -> last one seen
    std::map<const void*, std::map<uint32_t, uint32_t>> published_;

    uint32_t waiting_ = 0;  // at the barrier
    CallSite barrier_site_;
    BarrierResult gathered_{}, result_{};
    std::vector<std::deque<Meeting>> meetings_;  // by warp; stable addresses
    std::vector<unsigned> ended_;                // by warp: its lanes that have ended

    struct SharedVariable {
        const void* key;
        Region* region;
    };
    std::vector<SharedVariable> shared_;  // of this launch
    Region* dynamic_ = nullptr;
};

extern Machine machine;

}  // namespace xtoken::emulator
