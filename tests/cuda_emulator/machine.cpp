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
    while (threads_.size() < size_) threads_.push_back(std::make_unique<Thread>());
    ready_.assign((size_ + 63) / 64, 0);
    meetings_.assign((size_ + 31) / 32, {});
    ended_.assign((size_ + 31) / 32, 0);
    random_.seed(seed);
    first_epoch_ = ++epoch_;
    block_epochs_.clear();
    published_.clear();
    if (wanted.shared_bytes > 0) {
        void* memory = allocate_guarded(wanted.shared_bytes);
        dynamic_ = &regions.add("dynamic", memory, wanted.shared_bytes, true, false);
    }

    std::vector<uint64_t> sequence(blocks);
    std::iota(sequence.begin(), sequence.end(), 0);
    if (order == Order::reverse) std::reverse(sequence.begin(), sequence.end());
    if (order == Order::random) std::shuffle(sequence.begin(), sequence.end(), random_);
    for (const uint64_t block : sequence) {
        run_block(block);
        if (live_ != 0) break;  // it was stopped
    }

    for (const SharedVariable& variable : shared_) {
        char* memory = variable.region->begin;
        regions.remove(memory);
        free_guarded(memory);
    }
    shared_.clear();
    if (dynamic_ != nullptr) {
        char* memory = dynamic_->begin;
        regions.remove(memory);
        free_guarded(memory);
        dynamic_ = nullptr;
    }
    launch = nullptr;
    ++epoch_;
    if (report.empty()) return cudaSuccess;
    throw std::runtime_error(report.take("CUDA emulator: kernel " + name_of_function(wanted.kernel) + ", grid " +
                                         text_of(wanted.grid) + ", block " + text_of(wanted.block) + ", order " +
                                         emulator::name_of(order) + ", seed " + std::to_string(seed)));
}

void Machine::run_block(uint64_t block) {
    block_index = index_in(block, launch->grid);
    block_epochs_.emplace_back(++epoch_, block);
    received_.clear();
    waiting_ = 0;
    gathered_ = {0, 1, 0};
    for (auto& meetings : meetings_) meetings.clear();
    std::fill(ended_.begin(), ended_.end(), 0);
    for (SharedVariable& variable : shared_) variable.region->forget();
    if (dynamic_ != nullptr) dynamic_->forget();
    warp_ahead_ = static_cast<uint32_t>(random_() % meetings_.size());
    for (uint32_t i = 0; i < size_; ++i) {
        Thread& thread = *threads_[i];
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
    live_ = size_;
    current = order == Order::reverse ? threads_[0].get() : threads_[size_ - 1].get();
    current = choose();
    Fiber::change(main_context_, current->fiber.context());
    current = nullptr;
}

void Machine::thread_main(void*) {
    machine.launch->entry(machine.launch->kernel, machine.launch->arguments);
    machine.leave_thread();
}

void Machine::leave_thread() {
    if (!current->copies.empty()) stop_at_copy("its thread ends without a wait for it", current->copies.front());
    if (waiting_ != 0) {
        fail("divergent barrier: " + name_of_current() + " ends while others wait at a barrier", barrier_site_);
    }
    set_state(*current, Thread::State::exited);
    ended_[current->warp] |= 1u << current->lane;
    if (--live_ == 0) {
        void* finished = nullptr;
        Fiber::change(finished, main_context_);
    }
    change_thread();
}

void Machine::stop() {
    std::fill(ready_.begin(), ready_.end(), 0);
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
        ready_[thread.number / 64] |= bit;
    } else {
        ready_[thread.number / 64] &= ~bit;
    }
}

Thread* Machine::next_ready(uint32_t from, bool upwards) {
    for (uint32_t step = 0; step < size_; ++step) {
        const uint32_t i = upwards ? (from + step) % size_ : (from + size_ - step) % size_;
        const uint64_t word = ready_[i / 64];
        if (word >> (i % 64) & 1) return threads_[i].get();
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
            return next_ready(warp_ahead_ * 32, true);
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
        const Thread& thread = *threads_[i];
        if (thread.state == Thread::State::exited) continue;
        const std::string place =
            std::string(thread.state == Thread::State::at_barrier ? "block barrier" : "warp call") + " at " +
            text_of(thread.waits_at);
        auto& entry = places[place];
        if (entry.first++ == 0) entry.second = text_of(thread.index);
    }
    std::string text = "block " + text_of(block_index) + " waits for ever:";
    for (const auto& [place, threads] : places) {
        text += " " + std::to_string(threads.first) + " threads, first " + threads.second + ", at a " + place + ";";
    }
    text.pop_back();
    report.add("divergent barrier", nullptr, nullptr, text);
    stop();
}

// ---- barriers ----

BarrierResult Machine::block_barrier(int predicate, CallSite site) {
    if (live_ != size_) {
        fail("divergent barrier: " + name_of_current() + " waits for " + std::to_string(size_ - live_) +
                 " threads that have ended",
             site);
    }
    if (waiting_ == 0) {
        barrier_site_ = site;
    } else if (!(site == barrier_site_)) {
        fail("divergent barrier: " + name_of_current() + " is at another barrier than those that wait at " +
                 text_of(barrier_site_),
             site);
    }
    gathered_.count += predicate != 0;
    gathered_.every &= predicate != 0;
    gathered_.any |= predicate != 0;
    set_state(*current, Thread::State::at_barrier);
    current->waits_at = site;
    if (++waiting_ == size_) finish_barrier();
    change_thread();
    return result_;  // stays valid until all have reached the next barrier
}

void Machine::finish_barrier() {
    result_ = gathered_;
    gathered_ = {0, 1, 0};
    waiting_ = 0;
    ++epoch_;
    for (uint32_t i = 0; i < size_; ++i) {
        threads_[i]->clock = 1;
        std::fill(std::begin(threads_[i]->seen), std::end(threads_[i]->seen), 0);
        set_state(*threads_[i], Thread::State::ready);
    }
}

WarpValues Machine::warp_exchange(WarpCall call, unsigned mask, uint64_t value, CallSite site) {
    Thread* const first = threads_[current->warp * 32].get();
    if (!(mask >> current->lane & 1)) {
        fail("divergent warp: the mask of " + name_of_current() + " does not name the thread itself", site);
    }
    const uint32_t lanes = std::min(32u, size_ - current->warp * 32);
    if (lanes < 32) mask &= (1u << lanes) - 1;
    if (const unsigned ended = mask & ended_[current->warp]) {
        fail("divergent warp: " + name_of_current() + " waits for lane " + std::to_string(__builtin_ctz(ended)) +
                 ", which has ended",
             site);
    }
    auto& meetings = meetings_[current->warp];
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
            if (mask >> lane & 1) set_state(*threads_[first->number + lane], Thread::State::ready);
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
        Thread& thread = *threads_[first->number + lane];
        thread.seen[lane] = thread.clock;
        for (uint32_t other = 0; other < 32; ++other) joint[other] = std::max(joint[other], thread.seen[other]);
    }
    for (uint32_t lane = 0; lane < 32; ++lane) {
        if (!(meeting.mask >> lane & 1)) continue;
        Thread& thread = *threads_[first->number + lane];
        std::copy(std::begin(joint), std::end(joint), thread.seen);
        ++thread.clock;
    }
}

bool Machine::happened_before(Stamp stamp) const {
    const uint32_t when = stamp.epoch();
    if (when < first_epoch_ || stamp.bits == 0) return true;
    const uint32_t block_start = block_epochs_.back().first;
    if (when < block_start) {
        // Of another block: only what it has released.
        auto owner = std::upper_bound(block_epochs_.begin(), block_epochs_.end(), when,
                                      [](uint32_t epoch, const auto& entry) { return epoch < entry.first; });
        const auto seen = received_.find(owner[-1].first);
        return seen != received_.end() && when <= seen->second;
    }
    if (when < epoch_ || stamp.thread() == current->number) return true;
    return stamp.thread() / 32 == current->warp && stamp.clock() <= current->seen[stamp.thread() % 32];
}

void Machine::publish_and_receive(const void* address) {
    auto& published = published_[address];
    for (const auto& [block, until] : published) received_[block] = std::max(received_[block], until);
    if (current->fenced) {
        published[block_epochs_.back().first] = epoch_;
        // What it has acquired itself it releases too.
        for (const auto& [block, until] : received_) published[block] = std::max(published[block], until);
    }
}

std::string Machine::name_of(Stamp stamp) const {
    auto owner = std::upper_bound(block_epochs_.begin(), block_epochs_.end(), stamp.epoch(),
                                  [](uint32_t epoch, const auto& entry) { return epoch < entry.first; });
    return "thread " + text_of(index_in(stamp.thread(), launch->block)) + " of block " +
           text_of(index_in(owner[-1].second, launch->grid));
}

// ---- shared memory ----

void* Machine::shared_variable(const void* key, const char* name, size_t size, size_t alignment) {
    static_cast<void>(alignment);  // guarded memory is aligned to 256 bytes
    for (SharedVariable& variable : shared_) {
        if (variable.key == key) return variable.region->begin;
    }
    size_t total = size;
    for (const SharedVariable& variable : shared_) total += variable.region->size;
    if (total > static_shared_limit || total + launch->shared_bytes > shared_limit) {
        report.add("shared memory", key, nullptr,
                   std::string("'") + name + "' makes " + std::to_string(total) + " static bytes and " +
                       std::to_string(launch->shared_bytes) + " dynamic ones; a block has 48 KiB and 227 KiB in all");
        stop();
    }
    Region& region = regions.add(name, allocate_guarded(size), size, true, false);
    region.forget();
    shared_.push_back({key, &region});
    return region.begin;
}

void* Machine::dynamic_shared() {
    // If the launch asked for none: an address that belongs to no region.
    static char nothing;
    return dynamic_ != nullptr ? dynamic_->begin : &nothing;
}

// ---- what kernels call ----

cudaError_t run(const Launch& launch) { return machine.run(launch); }
uint3 thread_index() { return machine.current->index; }
uint3 block_index() { return machine.block_index; }
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
