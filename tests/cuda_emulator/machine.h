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

// The order in which runnable threads run; each runs until it waits for others. Blocks, as many at a time as there are
// multiprocessors, take turns at their barriers.
enum class Order {
    forward,    // by rising number, all warps evenly; a barrier a turn
    reverse,    // by falling number; blocks too
    random,     // drawn anew at each switch; blocks shuffled, some slower than others by up to 16 times
    one_ahead,  // one warp, drawn, runs as far as it can before any other; a block to its end before the next one
                // starts
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

struct Block;

struct Thread {
    Fiber fiber;
    Block* block;
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

// A multiprocessor's block, and the barrier that it is at.
struct Block {
    uint64_t number;
    uint3 index;
    std::vector<std::unique_ptr<Thread>> threads;  // kept from launch to launch
    uint32_t live = 0;
    std::vector<uint64_t> ready;  // one bit a thread
    uint32_t warp_ahead;
    uint32_t turn, left;  // barriers that it passes before another block's turn, and of this one
    uint32_t epoch;
    std::map<uint64_t, uint32_t> received;  // another block -> the last of its epochs that is seen here

    uint32_t waiting;  // at the barrier
    CallSite barrier_site;
    BarrierResult gathered, result;
    std::vector<std::deque<Meeting>> meetings;  // by warp; stable addresses
    std::vector<unsigned> ended;                // by warp: its lanes that have ended

    struct SharedVariable {
        const void* key;
        Region* region;
    };
    std::vector<SharedVariable> shared;
    Region* dynamic = nullptr;
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
    Stamp now(bool atomic) const { return Stamp::make(current->block->epoch, current->clock, current->number, atomic); }
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
    Order order = Order::forward;
    uint32_t seed = 0;
    int multiprocessors = 2;
    int device = 0, launched_on = -1;             // the current device, and that of the last launch
    std::map<const void*, size_t> dynamic_limit;  // by kernel, from cudaFuncSetAttribute

  private:
    void begin_block(Block& block, uint64_t number);
    void end_launch();
    static void thread_main(void* thread);
    void leave_thread();
    void change_thread();
    Thread* choose();
    Block* choose_block();
    Thread* next_ready(uint32_t from, bool upwards);
    void set_state(Thread& thread, Thread::State state);
    void finish_barrier();
    void finish_meeting(Meeting& meeting, Thread* first);
    uint32_t new_epoch(const Block& block);
    uint64_t block_of(Stamp stamp) const { return owners_[stamp.epoch() - first_epoch_]; }
    [[noreturn]] void report_deadlock();

    std::vector<std::unique_ptr<Block>> blocks_;  // one a multiprocessor
    Block* running_ = nullptr;
    uint32_t size_ = 0;  // threads of a block
    bool stopped_ = false;
    void* main_context_ = nullptr;
    std::mt19937 random_;

    uint32_t epoch_ = 1, first_epoch_ = 1;  // the newest, and the first of this launch
    std::vector<uint64_t> owners_;          // of this launch's epochs: their blocks
    std::map<const void*, std::map<uint64_t, uint32_t>> published_;
};

extern Machine machine;

}  // namespace xtoken::emulator
