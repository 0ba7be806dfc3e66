// Launches, scheduling, barriers and exchanges between lanes.
#include "machine.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <numeric>
#include <stdexcept>

namespace xtoken::emulator {

Machine machine;

namespace {

constexpr size_t static_shared_limit = 48 << 10, shared_limit = 227 << 10;
constexpr unsigned max_threads = 1024;

std::string text_of(uint3 index) {
    return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

std::string text_of(dim3 size) { return text_of(uint3{size.x, size.y, size.z}); }

std::string text_of(CallSite site) {
    const std::string file = site.file;
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

const char* name_of(Order order) {
    const char* const names[] = {"forward", "reverse", "random", "one_ahead"};
    return names[static_cast<int>(order)];
}

uint3 index_in(uint64_t number, dim3 size) {
    return {static_cast<unsigned>(number % size.x), static_cast<unsigned>(number / size.x % size.y),
            static_cast<unsigned>(number / size.x / size.y)};
}

}  // namespace

bool CallSite::operator==(const CallSite& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
}

// ---- launches ----

cudaError_t Machine::run(const Launch& wanted) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    const uint64_t threads = uint64_t{wanted.block.x} * wanted.block.y * wanted.block.z;
    const uint64_t blocks = uint64_t{wanted.grid.x} * wanted.grid.y * wanted.grid.z;
    if (threads == 0 || threads > max_threads || blocks == 0 || wanted.grid.y > 65535 || wanted.grid.z > 65535) {
        return cudaErrorInvalidConfiguration;
    }
    const auto limit = dynamic_limit.find(wanted.kernel);
    if (wanted.shared_bytes > (limit == dynamic_limit.end() ? static_shared_limit : limit->second)) {
        return cudaErrorInvalidValue;
    }
    launch = &wanted;
    launched_on = device;
    size_ = static_cast<uint32_t>(threads);
    while (blocks_.size() < static_cast<size_t>(multiprocessors)) blocks_.push_back(std::make_unique<Block>());
    random_.seed(seed);
    first_epoch_ = ++epoch_;
    owners_.assign(1, 0);
    published_.clear();
    stopped_ = false;
    running_ = nullptr;

    std::vector<uint64_t> sequence(blocks);
    std::iota(sequence.begin(), sequence.end(), 0);
    if (order == Order::reverse) std::reverse(sequence.begin(), sequence.end());
    if (order == Order::random) std::shuffle(sequence.begin(), sequence.end(), random_);
    auto next = sequence.begin();
    while (!stopped_) {
        for (int i = 0; i < multiprocessors && next != sequence.end(); ++i) {
            if (blocks_[i]->live == 0) begin_block(*blocks_[i], *next++);
        }
        running_ = choose_block();
        if (running_ == nullptr) break;
        current = running_->threads[order == Order::reverse ? 0 : size_ - 1].get();
        current = choose();
        Fiber::change(main_context_, current->fiber.context());  // until a block has ended
        current = nullptr;
    }
    end_launch();
    if (report.empty()) return cudaSuccess;
    throw std::runtime_error(report.take("CUDA emulator: kernel " + name_of_function(wanted.kernel) + ", grid " +
                                         text_of(wanted.grid) + ", block " + text_of(wanted.block) + ", order " +
                                         emulator::name_of(order) + ", seed " + std::to_string(seed)));
}

void Machine::end_launch() {
    const auto free_region = [&](Region* region) {
        char* memory = region->begin;
        regions.remove(memory);
        free_guarded(memory);
    };
    for (const auto& block : blocks_) {
        for (const auto& variable : block->shared) free_region(variable.region);
        if (block->dynamic != nullptr) free_region(block->dynamic);
        block->shared.clear();
        block->dynamic = nullptr;
        block->live = 0;
    }
    launch = nullptr;
    ++epoch_;
}

uint32_t Machine::new_epoch(const Block& block) {
    owners_.push_back(block.number);
    return ++epoch_;
}

void Machine::begin_block(Block& block, uint64_t number) {
    block.number = number;
    block.index = index_in(number, launch->grid);
    block.epoch = new_epoch(block);
    block.received.clear();
    block.waiting = 0;
    block.gathered = {0, 1, 0};
    block.ready.assign((size_ + 63) / 64, 0);
    block.meetings.assign((size_ + 31) / 32, {});
    block.ended.assign((size_ + 31) / 32, 0);
    if (block.dynamic == nullptr && launch->shared_bytes > 0) {
        void* memory = allocate_guarded(launch->shared_bytes);
        block.dynamic = &regions.add("dynamic", memory, launch->shared_bytes, true, false);
    }
    for (const auto& variable : block.shared) variable.region->forget();
    if (block.dynamic != nullptr) block.dynamic->forget();
    block.warp_ahead = static_cast<uint32_t>(random_() % block.meetings.size());
    block.turn = block.left = order == Order::random ? 1u << random_() % 5 : 1;
    while (block.threads.size() < size_) block.threads.push_back(std::make_unique<Thread>());
    for (uint32_t i = 0; i < size_; ++i) {
        Thread& thread = *block.threads[i];
        thread.block = &block;
        thread.index = index_in(i, launch->block);
        thread.number = i;
        thread.warp = i / 32;
        thread.lane = i % 32;
        thread.clock = 1;
        std::fill(std::begin(thread.seen), std::end(thread.seen), 0);
        thread.fenced = false;
        thread.copies.clear();
        thread.groups = 0;
        thread.fiber.start(&Machine::thread_main, &thread);
        set_state(thread, Thread::State::ready);
    }
    block.live = size_;
}

void Machine::thread_main(void*) {
    machine.launch->entry(machine.launch->kernel, machine.launch->arguments);
    machine.leave_thread();
}

void Machine::leave_thread() {
    if (!current->copies.empty()) stop_at_copy("its thread ends without a wait for it", current->copies.front());
    Block& block = *current->block;
    if (block.waiting != 0) {
        fail("divergent barrier: " + name_of_current() + " ends while others wait at a barrier", block.barrier_site);
    }
    set_state(*current, Thread::State::exited);
    block.ended[current->warp] |= 1u << current->lane;
    if (--block.live == 0) {
        void* finished = nullptr;
        Fiber::change(finished, main_context_);
    }
    change_thread();
}

void Machine::stop() {
    stopped_ = true;
    void* abandoned = nullptr;
    Fiber::change(abandoned, main_context_);
    __builtin_unreachable();
}

void Machine::fail(const std::string& what, CallSite site) {
    const size_t colon = what.find(": ");
    report.add(what.substr(0, colon), nullptr, nullptr, what.substr(colon + 2) + ", " + text_of(site));
    stop();
}

// ---- scheduling ----

void Machine::set_state(Thread& thread, Thread::State state) {
    thread.state = state;
    const uint64_t bit = uint64_t{1} << (thread.number % 64);
    if (state == Thread::State::ready) {
        thread.block->ready[thread.number / 64] |= bit;
    } else {
        thread.block->ready[thread.number / 64] &= ~bit;
    }
}

Thread* Machine::next_ready(uint32_t from, bool upwards) {
    for (uint32_t step = 0; step < size_; ++step) {
        const uint32_t i = upwards ? (from + step) % size_ : (from + size_ - step) % size_;
        const uint64_t word = running_->ready[i / 64];
        if (word >> (i % 64) & 1) return running_->threads[i].get();
        // Nothing in the rest of the word: skip it.
        if (upwards && word >> (i % 64) == 0) step += std::min(63 - i % 64, size_ - 1 - i);
    }
    return nullptr;
}

Thread* Machine::choose() {
    switch (order) {
        case Order::forward:
            return next_ready((current->number + 1) % size_, true);
        case Order::reverse:
            return next_ready((current->number + size_ - 1) % size_, false);
        case Order::random:
            return next_ready(static_cast<uint32_t>(random_() % size_), true);
        case Order::one_ahead:
            return next_ready(running_->warp_ahead * 32, true);
    }
    return nullptr;
}

// The block whose turn it is; null if all have ended.
Block* Machine::choose_block() {
    const bool is_live = running_ != nullptr && running_->live > 0;
    if (is_live && (order == Order::one_ahead || --running_->left > 0)) return running_;
    const int count = static_cast<int>(blocks_.size()), step = order == Order::reverse ? count - 1 : 1;
    int at = order == Order::reverse ? 0 : count - 1;
    for (int i = 0; i < count; ++i) {
        if (blocks_[i].get() == running_) at = i;
    }
    for (int i = 0; i < count; ++i) {
        at = (at + step) % count;
        Block& block = *blocks_[at];
        if (block.live == 0) continue;
        block.left = block.turn;
        return &block;
    }
    return nullptr;
}

// Lets another thread run; returns when this one's turn comes again.
void Machine::change_thread() {
    Thread* next = choose();
    if (next == nullptr) report_deadlock();
    if (next == current) return;
    Thread* self = current;
    current = next;
    Fiber::change(self->fiber.context(), next->fiber.context());
}

void Machine::report_deadlock() {
    std::map<std::string, std::pair<uint32_t, std::string>> places;
    for (uint32_t i = 0; i < size_; ++i) {
        const Thread& thread = *running_->threads[i];
        if (thread.state == Thread::State::exited) continue;
        const std::string place =
            std::string(thread.state == Thread::State::at_barrier ? "block barrier" : "warp call") + " at " +
            text_of(thread.waits_at);
        auto& entry = places[place];
        if (entry.first++ == 0) entry.second = text_of(thread.index);
    }
    std::string text = "block " + text_of(running_->index) + " waits for ever:";
    for (const auto& [place, threads] : places) {
        text += " " + std::to_string(threads.first) + " threads, first " + threads.second + ", at a " + place + ";";
    }
    text.pop_back();
    report.add("divergent barrier", nullptr, nullptr, text);
    stop();
}

// ---- barriers ----

BarrierResult Machine::block_barrier(int predicate, CallSite site) {
    Block& block = *current->block;
    if (block.live != size_) {
        fail("divergent barrier: " + name_of_current() + " waits for " + std::to_string(size_ - block.live) +
                 " threads that have ended",
             site);
    }
    if (block.waiting == 0) {
        block.barrier_site = site;
    } else if (!(site == block.barrier_site)) {
        fail("divergent barrier: " + name_of_current() + " is at another barrier than those that wait at " +
                 text_of(block.barrier_site),
             site);
    }
    block.gathered.count += predicate != 0;
    block.gathered.every &= predicate != 0;
    block.gathered.any |= predicate != 0;
    set_state(*current, Thread::State::at_barrier);
    current->waits_at = site;
    if (++block.waiting == size_) finish_barrier();
    change_thread();
    return block.result;  // stays valid until all have reached the next barrier
}

void Machine::finish_barrier() {
    Block& block = *current->block;
    block.result = block.gathered;
    block.gathered = {0, 1, 0};
    block.waiting = 0;
    block.epoch = new_epoch(block);
    for (uint32_t i = 0; i < size_; ++i) {
        Thread& thread = *block.threads[i];
        thread.clock = 1;
        std::fill(std::begin(thread.seen), std::end(thread.seen), 0);
        set_state(thread, Thread::State::ready);
    }
    running_ = choose_block();
}

WarpValues Machine::warp_exchange(WarpCall call, unsigned mask, uint64_t value, CallSite site) {
    Block& block = *current->block;
    Thread* const first = block.threads[current->warp * 32].get();
    if (!(mask >> current->lane & 1)) {
        fail("divergent warp: the mask of " + name_of_current() + " does not name the thread itself", site);
    }
    const uint32_t lanes = std::min(32u, size_ - current->warp * 32);
    if (lanes < 32) mask &= (1u << lanes) - 1;
    if (const unsigned ended = mask & block.ended[current->warp]) {
        fail("divergent warp: " + name_of_current() + " waits for lane " + std::to_string(__builtin_ctz(ended)) +
                 ", which has ended",
             site);
    }
    auto& meetings = block.meetings[current->warp];
    Meeting* meeting = nullptr;
    for (Meeting& open : meetings) {
        if (open.arrived == open.mask || !(open.mask & mask)) continue;
        if (open.mask != mask || open.call != call || !(open.site == site)) {
            fail("divergent warp: " + name_of_current() + " is at another call, or has another mask, than a lane at " +
                     text_of(open.site),
                 site);
        }
        meeting = &open;
    }
    if (meeting == nullptr) {
        const auto unused = std::find_if(meetings.begin(), meetings.end(), [](auto& m) { return m.left == m.mask; });
        meeting = unused != meetings.end() ? &*unused : &meetings.emplace_back();
        meeting->call = call;
        meeting->mask = mask;
        meeting->arrived = meeting->left = 0;
        meeting->site = site;
    }
    meeting->arrived |= 1u << current->lane;
    meeting->value[current->lane] = value;
    set_state(*current, Thread::State::in_warp);
    current->waits_at = site;
    if (meeting->arrived == mask) {
        for (uint32_t lane = 0; lane < lanes; ++lane) {
            if (mask >> lane & 1) set_state(*block.threads[first->number + lane], Thread::State::ready);
        }
        if (call == WarpCall::sync) finish_meeting(*meeting, first);
    }
    change_thread();
    WarpValues values;
    values.lanes = mask;
    values.lane = current->lane;
    std::memcpy(values.value, meeting->value, sizeof values.value);
    meeting->left |= 1u << current->lane;
    return values;
}

// A warp barrier: each lane now sees what the others had seen and done. Other exchanges order no memory accesses.
void Machine::finish_meeting(Meeting& meeting, Thread* first) {
    uint32_t joint[32] = {};
    for (uint32_t lane = 0; lane < 32; ++lane) {
        if (!(meeting.mask >> lane & 1)) continue;
        Thread& thread = *first->block->threads[first->number + lane];
        thread.seen[lane] = thread.clock;
        for (uint32_t other = 0; other < 32; ++other) joint[other] = std::max(joint[other], thread.seen[other]);
    }
    for (uint32_t lane = 0; lane < 32; ++lane) {
        if (!(meeting.mask >> lane & 1)) continue;
        Thread& thread = *first->block->threads[first->number + lane];
        std::copy(std::begin(joint), std::end(joint), thread.seen);
        ++thread.clock;
    }
}

bool Machine::happened_before(Stamp stamp) const {
    const uint32_t when = stamp.epoch();
    if (when < first_epoch_ || stamp.bits == 0) return true;
    const Block& block = *current->block;
    if (block_of(stamp) != block.number) {  // only what that one has released
        const auto seen = block.received.find(block_of(stamp));
        return seen != block.received.end() && when <= seen->second;
    }
    if (when < block.epoch || stamp.thread() == current->number) return true;
    return stamp.thread() / 32 == current->warp && stamp.clock() <= current->seen[stamp.thread() % 32];
}

void Machine::publish_and_receive(const void* address) {
    auto& published = published_[address];
    Block& block = *current->block;
    for (const auto& [other, until] : published) block.received[other] = std::max(block.received[other], until);
    if (current->fenced) {
        published[block.number] = block.epoch;
        // What it has acquired itself it releases too.
        for (const auto& [other, until] : block.received) published[other] = std::max(published[other], until);
    }
}

std::string Machine::name_of(Stamp stamp) const {
    return "thread " + text_of(index_in(stamp.thread(), launch->block)) + " of block " +
           text_of(index_in(block_of(stamp), launch->grid));
}

// ---- shared memory ----

void* Machine::shared_variable(const void* key, const char* name, size_t size, size_t alignment) {
    static_cast<void>(alignment);  // guarded memory is aligned to 256 bytes
    auto& variables = current->block->shared;
    for (const auto& variable : variables) {
        if (variable.key == key) return variable.region->begin;
    }
    size_t total = size;
    for (const auto& variable : variables) total += variable.region->size;
    if (total > static_shared_limit || total + launch->shared_bytes > shared_limit) {
        report.add("shared memory", key, nullptr,
                   std::string("'") + name + "' makes " + std::to_string(total) + " static bytes and " +
                       std::to_string(launch->shared_bytes) + " dynamic ones; a block has 48 KiB and 227 KiB in all");
        stop();
    }
    Region& region = regions.add(name, allocate_guarded(size), size, true, false);
    region.forget();
    variables.push_back({key, &region});
    return region.begin;
}

void* Machine::dynamic_shared() {
    // If the launch asked for none: an address that belongs to no region.
    static char nothing;
    return current->block->dynamic != nullptr ? current->block->dynamic->begin : &nothing;
}

// ---- what kernels call ----

cudaError_t run(const Launch& launch) { return machine.run(launch); }
uint3 thread_index() { return machine.current->index; }
uint3 block_index() { return machine.current->block->index; }
dim3 block_size() { return machine.launch->block; }
dim3 grid_size() { return machine.launch->grid; }
void* shared_variable(const void* key, const char* name, size_t size, size_t alignment) {
    return machine.shared_variable(key, name, size, alignment);
}
void* dynamic_shared() { return machine.dynamic_shared(); }
BarrierResult block_barrier(int predicate, const char* file, int line) {
    return machine.block_barrier(predicate, {file, line});
}
WarpValues warp_exchange(WarpCall call, unsigned mask, uint64_t value, const char* file, int line) {
    return machine.warp_exchange(call, mask, value, {file, line});
}
uint64_t value_of_lane(const WarpValues& values, unsigned source, const char* file, int line) {
    if (source >= 32 || !(values.lanes >> source & 1)) {
        machine.fail("divergent warp: " + machine.name_of_current() + " reads lane " + std::to_string(source) +
                         ", which takes no part",
                     {file, line});
    }
    return values.value[source];
}
void uncounted_copy(void* to, const void* from, size_t size) { std::memcpy(to, from, size); }
void fence() { machine.current->fenced = true; }
void commit_copies() { ++machine.current->groups; }
void wait_copies(unsigned pending) {
    auto& copies = machine.current->copies;
    while (!copies.empty() && copies.front().group + pending < machine.current->groups) {
        finish_copy(copies.front());
        copies.pop_front();
    }
}
void trap(const char* file, int line) { machine.fail("trap: called by " + machine.name_of_current(), {file, line}); }

}  // namespace xtoken::emulator
