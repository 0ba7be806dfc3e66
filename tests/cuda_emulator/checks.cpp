// Checks of every access. Kernel sources are compiled with -fsanitize=thread; its calls before each access are defined
// here, in place of ThreadSanitizer's own library.
#include <link.h>

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace xtoken::emulator {
namespace {

// Static data of the module that holds the kernels: tables, constants, the emulator itself.
struct ModuleData {
    const char* begin = nullptr;
    const char* end = nullptr;

    ModuleData() {
        dl_iterate_phdr(
            [](dl_phdr_info* module, size_t, void* self) {
                const auto inside = reinterpret_cast<uintptr_t>(&machine);
                uintptr_t low = UINTPTR_MAX, high = 0;
                for (int i = 0; i < module->dlpi_phnum; ++i) {
                    const auto& segment = module->dlpi_phdr[i];
                    if (segment.p_type != PT_LOAD) continue;
                    low = std::min<uintptr_t>(low, module->dlpi_addr + segment.p_vaddr);
                    high = std::max<uintptr_t>(high, module->dlpi_addr + segment.p_vaddr + segment.p_memsz);
                }
                if (inside < low || inside >= high) return 0;
                auto* data = static_cast<ModuleData*>(self);
                data->begin = reinterpret_cast<const char*>(low);
                data->end = reinterpret_cast<const char*>(high);
                return 1;
            },
            this);
    }
    bool holds(const char* address) const { return address >= begin && address < end; }
};
const ModuleData module_data;

const char* verb(Access access) {
    const char* const verbs[] = {"read", "write", "atomic update", "read-only load"};
    return verbs[static_cast<int>(access)];
}

std::string sentence(Access access, size_t size, const void* address, const void* code) {
    return std::string(verb(access)) + " of " + std::to_string(size) + " bytes at " +
           machine.regions.describe(address) + " by " + machine.name_of_current() + ", " + place_of(code);
}

[[noreturn]] void stop_at(const char* kind, Access access, size_t size, const void* address, const void* code,
                          const char* why = "") {
    machine.report.add(kind, code, nullptr, sentence(access, size, address, code) + why);
    machine.stop();
}

void report_race(Access access, size_t size, const char* address, const void* code, const Use& other,
                 bool other_wrote) {
    const bool between_blocks = machine.name_of(other.stamp).substr(machine.name_of(other.stamp).find(" of ")) !=
                                machine.name_of_current().substr(machine.name_of_current().find(" of "));
    const char* kind = between_blocks ? "race between blocks" : "race";
    if (machine.report.has(kind, code, other.code)) return;
    machine.report.add(kind, code, other.code,
                       sentence(access, size, address, code) + "; " +
                           (other.stamp.atomic() ? "atomic update"
                            : other_wrote        ? "write"
                                                 : "read") +
                           " by " + machine.name_of(other.stamp) + ", " + place_of(other.code) +
                           ", with no barrier between");
}

void note_read(History& byte, Use use) {
    const Stamp last = byte.read.stamp;
    if (last.epoch() == use.stamp.epoch() && last.thread() / 32 != use.stamp.thread() / 32) {
        byte.other_read = use;
    } else {
        if (!machine.happened_before(last)) byte.other_read = byte.read;
        byte.read = use;
    }
}

}  // namespace

void check_access(const void* pointer, size_t size, Access access, bool aligned, const void* code) {
    Thread* const thread = machine.current;
    if (thread == nullptr || size == 0 || thread->fiber.owns(pointer)) return;
    const char* address = static_cast<const char*>(pointer);
    if (module_data.holds(address)) return;
    Region* region = machine.regions.find(address);
    if (region == nullptr) {
        const char* arguments = static_cast<const char*>(machine.launch->arguments);
        if (address >= arguments && address + size <= arguments + machine.launch->arguments_size) return;
        stop_at("out of bounds", access, size, address, code);
    }
    const size_t offset = address - region->begin;
    if (size > region->size - offset) stop_at("out of bounds", access, size, address, code);
    if (aligned && reinterpret_cast<uintptr_t>(address) % size != 0) stop_at("misaligned", access, size, address, code);

    const bool reads = access != Access::write, writes = access == Access::write || access == Access::atomic;
    region->bytes_read += reads && access != Access::read_only ? size : 0;  // which a plain read follows
    region->bytes_written += writes ? size : 0;
    unsigned char* written = region->written.data() + offset;
    if (reads && std::memchr(written, 0, size) != nullptr) {
        const char* kind = "uninitialised";
        if (!machine.report.has(kind, code, nullptr)) {
            machine.report.add(kind, code, nullptr, sentence(access, size, address, code) + ": nobody wrote there");
        }
    }
    if (region->shared && std::memchr(written, in_flight, size) != nullptr) {
        stop_at("asynchronous copy", access, size, address, code, ": nobody has waited for the copy to it");
    }
    if (writes) std::memset(written, 1, size);

    const Use use{machine.now(access == Access::atomic), code};
    Stamp checked;  // neighbouring bytes mostly have the same history
    for (History* byte = &region->history[offset]; byte != &region->history[offset] + size; ++byte) {
        const bool both_atomic = access == Access::atomic && byte->write.stamp.atomic();
        if (byte->write.stamp.bits != checked.bits && !both_atomic) {
            if (!machine.happened_before(byte->write.stamp)) {
                report_race(access, size, address, code, byte->write, true);
            } else if (access == Access::read_only && machine.in_this_launch(byte->write.stamp) &&
                       !machine.report.has("read-only", code, nullptr)) {
                machine.report.add("read-only", code, nullptr,
                                   sentence(access, size, address, code) + ": this launch writes there");
            }
            checked = byte->write.stamp;
        }
        if (writes) {
            for (const Use& read : {byte->read, byte->other_read}) {
                if (!machine.happened_before(read.stamp)) report_race(access, size, address, code, read, false);
            }
            *byte = {use, {}, {}};
        } else {
            note_read(*byte, use);
        }
    }
}

void stop_at_copy(const char* what, const Copy& copy) {
    machine.report.add("asynchronous copy", copy.code, nullptr,
                       "of " + std::to_string(copy.size) + " bytes from " + machine.regions.describe(copy.from) +
                           " to " + machine.regions.describe(copy.to) + " by " + machine.name_of_current() + ", " +
                           place_of(copy.code) + ": " + what);
    machine.stop();
}

void start_copy(void* to, const void* from, size_t size) {
    Copy copy{static_cast<char*>(to),  static_cast<const char*>(from), size,
              machine.current->groups, __builtin_return_address(0),    {}};
    check_access(from, size, Access::read, true, copy.code);
    check_access(to, size, Access::write, true, copy.code);
    Region *const target = machine.regions.find(to), *const source = machine.regions.find(from);
    if (target == nullptr || !target->shared) stop_at_copy("to what is not shared memory", copy);
    if (source == nullptr || source->shared) stop_at_copy("from what is not global memory", copy);
    std::memset(target->written.data() + (copy.to - target->begin), in_flight, size);
    std::memset(to, 0xff, size);
    const History* history = source->history.begin() + (copy.from - source->begin);
    for (size_t i = 0; i < size; ++i) copy.source.push_back(history[i].write.stamp);
    machine.current->copies.push_back(std::move(copy));
}

void finish_copy(const Copy& copy) {
    const Region* const source = machine.regions.find(copy.from);
    const History* history = source->history.begin() + (copy.from - source->begin);
    for (size_t i = 0; i < copy.size; ++i) {
        if (history[i].write.stamp.bits != copy.source[i].bits) stop_at_copy("its source was written meanwhile", copy);
    }
    Region* const target = machine.regions.find(copy.to);
    std::memset(target->written.data() + (copy.to - target->begin), 0, copy.size);
    check_access(copy.to, copy.size, Access::write, true, copy.code);
    std::memcpy(copy.to, copy.from, copy.size);
}

void atomic_access(const void* address, size_t size) {
    check_access(address, size, Access::atomic, true, __builtin_return_address(0));
    machine.publish_and_receive(address);
}
void read_only_access(const void* address, size_t size) {
    check_access(address, size, Access::read_only, false, __builtin_return_address(0));
}

}  // namespace xtoken::emulator

// ---- the calls that -fsanitize=thread makes ----

using xtoken::emulator::Access;
using xtoken::emulator::check_access;

#define XTOKEN_HOOK(name, size, access, aligned)                                   \
    extern "C" __attribute__((visibility("hidden"))) void name(void* address) {    \
        check_access(address, size, access, aligned, __builtin_return_address(0)); \
    }
#define XTOKEN_HOOKS(size)                                              \
    XTOKEN_HOOK(__tsan_read##size, size, Access::read, true)            \
    XTOKEN_HOOK(__tsan_write##size, size, Access::write, true)          \
    XTOKEN_HOOK(__tsan_unaligned_read##size, size, Access::read, false) \
    XTOKEN_HOOK(__tsan_unaligned_write##size, size, Access::write, false)
XTOKEN_HOOKS(1)
XTOKEN_HOOKS(2)
XTOKEN_HOOKS(4)
XTOKEN_HOOKS(8)
XTOKEN_HOOKS(16)

extern "C" {
__attribute__((visibility("hidden"))) void __tsan_init() {}
__attribute__((visibility("hidden"))) void __tsan_read_range(void* address, size_t size) {
    check_access(address, size, Access::read, false, __builtin_return_address(0));
}
__attribute__((visibility("hidden"))) void __tsan_write_range(void* address, size_t size) {
    check_access(address, size, Access::write, false, __builtin_return_address(0));
}
// Host code: guards of function-local statics.
__attribute__((visibility("hidden"))) unsigned char __tsan_atomic8_load(const unsigned char* address, int) {
    return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}
__attribute__((visibility("hidden"))) void __tsan_vptr_update(void**, void*) {}
__attribute__((visibility("hidden"))) void __tsan_vptr_read(void**) {}
}
