// The part of CUDA's runtime API that launchers call, and the functions by which tests control the emulator.
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "machine.h"

using xtoken::emulator::machine;

namespace {

int shared_limit = 227 << 10, capability = 90, driver = CUDART_VERSION;
constexpr int devices = 4;
enum class Errors { none, above, below, mixed } errors = Errors::none;
thread_local std::string last_failure;

template <typename Function>
int guarded(Function function) {
    try {
        function();
        return 0;
    } catch (const std::exception& error) {
        last_failure = error.what();
        return 1;
    }
}

// 1 or -1: the result for this argument lies above or below the exact one; 0: neither.
int direction(float argument) {
    if (errors == Errors::none || argument == 0.0f) return 0;  // exp(0) is exact
    if (errors != Errors::mixed) return errors == Errors::above ? 1 : -1;
    return xtoken::emulator::bits<uint32_t>(argument) * 0x9e3779b9u >> 31 == 0 ? 1 : -1;
}

}  // namespace

namespace xtoken::emulator {

float approximate(double exact, int ulps, float argument) {
    auto result = static_cast<float>(exact);
    const int way = result == 0.0f || !std::isfinite(result) ? 0 : direction(argument);
    for (int i = 0; way != 0 && i < ulps; ++i) result = std::nextafter(result, way * INFINITY);
    return result;
}

float approximate_within(double exact, double error, float argument) {
    if (std::isinf(exact)) return static_cast<float>(exact);
    return static_cast<float>(exact + direction(argument) * 0.75 * error);  // rounding may take the rest
}

}  // namespace xtoken::emulator

extern "C" {

// ---- CUDA's runtime API ----

cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t error) { return error == cudaSuccess ? "cudaSuccess" : "cudaError"; }
const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "no error";
        case cudaErrorInvalidConfiguration:
            return "invalid configuration argument";
        case cudaErrorInvalidValue:
            return "invalid argument";
        case cudaErrorInvalidDevice:
            return "invalid device ordinal";
        default:
            return "unknown error";
    }
}
cudaError_t cudaGetDevice(int* device) {
    *device = machine.device;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
    *count = devices;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= devices) return cudaErrorInvalidDevice;
    machine.device = device;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
    *version = driver;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (device < 0 || device >= devices) return cudaErrorInvalidDevice;
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount:
            *value = machine.multiprocessors;
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = shared_limit;
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
            *value = 228 << 10;
            return cudaSuccess;
        case cudaDevAttrMaxThreadsPerMultiProcessor:
            *value = 2048;
            return cudaSuccess;
        case cudaDevAttrL2CacheSize:
            *value = 50 << 20;
            return cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor:
            *value = capability / 10;
            return cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor:
            *value = capability % 10;
            return cudaSuccess;
        default:
            return cudaErrorInvalidValue;
    }
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
        if (value < 0 || value > 227 << 10) return cudaErrorInvalidValue;
        machine.dynamic_limit[kernel] = static_cast<size_t>(value);
    }
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads, size_t shared_bytes) {
    if (threads < 1 || threads > 1024) return cudaErrorInvalidValue;
    *blocks = 2048 / threads;
    if (shared_bytes > 0) *blocks = std::min(*blocks, static_cast<int>((228 << 10) / shared_bytes));
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t size, cudaStream_t) {
    if (size == 0) return cudaSuccess;
    auto* region = machine.regions.find(memory);
    if (region == nullptr || size > region->size - (static_cast<char*>(memory) - region->begin)) {
        return cudaErrorInvalidValue;
    }
    std::memset(memory, value, size);
    std::memset(region->written.data() + (static_cast<char*>(memory) - region->begin), 1, size);
    return cudaSuccess;
}

// ---- control ----

#define XTOKEN_EXPORT __attribute__((visibility("default")))

// Each returns 0, or 1 and the reason in xtoken_emulator_failure().
XTOKEN_EXPORT const char* xtoken_emulator_failure() { return last_failure.c_str(); }

// Order: 0 forward, 1 reverse, 2 random, 3 one warp ahead.
XTOKEN_EXPORT int xtoken_emulator_set_order(int order, unsigned seed) {
    return guarded([&] {
        if (order < 0 || order > 3) throw std::invalid_argument("emulator: orders are 0 to 3");
        machine.order = static_cast<xtoken::emulator::Order>(order);
        machine.seed = seed;
    });
}
// Errors: 0 none, 1 above, 2 below, 3 either, by the argument.
XTOKEN_EXPORT int xtoken_emulator_set_errors(int kind) {
    return guarded([&] {
        if (kind < 0 || kind > 3) throw std::invalid_argument("emulator: errors are 0 to 3");
        errors = static_cast<Errors>(kind);
    });
}
XTOKEN_EXPORT int xtoken_emulator_set_shared_limit(int bytes) {
    return guarded([&] { shared_limit = bytes; });
}
XTOKEN_EXPORT int xtoken_emulator_set_multiprocessors(int count) {
    return guarded([&] {
        if (count < 1) throw std::invalid_argument("emulator: at least one multiprocessor");
        machine.multiprocessors = count;
    });
}
// What the devices say of themselves: compute capability (90 for 9.0) and the driver's version (12040 for 12.4;
// 0: that of the headers).
XTOKEN_EXPORT int xtoken_emulator_set_machine(int of_devices, int of_driver) {
    return guarded([&] {
        capability = of_devices;
        driver = of_driver == 0 ? CUDART_VERSION : of_driver;
    });
}
// The current device, and the one that the last launch ran on; -1: none yet.
XTOKEN_EXPORT int xtoken_emulator_devices(int* current, int* launched) {
    return guarded([&] {
        *current = machine.device;
        *launched = machine.launched_on;
    });
}

// Uninitialised memory with inaccessible pages around it.
XTOKEN_EXPORT int xtoken_emulator_allocate(const char* name, size_t size, void** memory) {
    return guarded([&] {
        *memory = xtoken::emulator::allocate_guarded(size);
        machine.regions.add(name, *memory, size, false, false).forget();
    });
}
XTOKEN_EXPORT int xtoken_emulator_free(void* memory) {
    return guarded([&] {
        machine.regions.remove(memory);
        xtoken::emulator::free_guarded(memory);
    });
}
// Which of these bytes the caller has written itself: mask [size], 0 or 1.
XTOKEN_EXPORT int xtoken_emulator_set_written(void* memory, size_t size, const unsigned char* mask) {
    return guarded([&] {
        auto* region = machine.regions.find(memory);
        const size_t offset = region == nullptr ? 0 : static_cast<char*>(memory) - region->begin;
        if (region == nullptr || size > region->size - offset) throw std::invalid_argument("emulator: no such memory");
        std::memcpy(region->written.data() + offset, mask, size);
    });
}
// How many of these bytes nobody has written.
XTOKEN_EXPORT int xtoken_emulator_unwritten(const void* memory, size_t size, size_t* count) {
    return guarded([&] {
        auto* region = machine.regions.find(memory);
        const size_t offset = region == nullptr ? 0 : static_cast<const char*>(memory) - region->begin;
        if (region == nullptr || size > region->size - offset) throw std::invalid_argument("emulator: no such memory");
        const auto begin = region->written.begin() + offset;
        *count = std::count(begin, begin + size, 0);
    });
}
// What kernels have read and written of an allocation, and in how many different sectors of 32 bytes.
XTOKEN_EXPORT int xtoken_emulator_traffic(const void* memory, uint64_t* read, uint64_t* written, uint64_t* sectors) {
    return guarded([&] {
        const auto* region = machine.regions.find(memory);
        if (region == nullptr) throw std::invalid_argument("emulator: no such memory");
        *read = region->bytes_read;
        *written = region->bytes_written;
        *sectors = 0;
        for (size_t begin = 0; begin < region->size; begin += 32) {
            const auto first = region->history.begin() + begin;
            *sectors += std::any_of(first, first + std::min<size_t>(32, region->size - begin), [](const auto& byte) {
                return byte.read.stamp.bits != 0 || byte.write.stamp.bits != 0;
            });
        }
    });
}
}
