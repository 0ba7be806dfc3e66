// A number that tells contents apart, computed as fast as memory is read.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace xtoken {

// Contents that differ in one word have different digests; others are told apart but for chance.
inline uint64_t digest(const uint8_t* data, size_t size) {
    constexpr uint64_t factor = 0x9E3779B97F4A7C15u;
    std::array<uint64_t, 8> lane{1, 2, 3, 4, 5, 6, 7, 8};
    const auto take = [&](const uint8_t* block) {
        for (size_t l = 0; l < lane.size(); ++l) {
            uint64_t word;
            std::memcpy(&word, block + sizeof(word) * l, sizeof(word));
            lane[l] = (lane[l] ^ word) * factor;
        }
    };
    constexpr size_t step = sizeof(lane);
    size_t i = 0;
    for (; i + step <= size; i += step) take(data + i);
    std::array<uint8_t, step> rest{};
    if (i < size) std::memcpy(rest.data(), data + i, size - i);
    take(rest.data());
    uint64_t result = size;
    for (const uint64_t part : lane) result = (result ^ part ^ (part >> 32)) * factor;
    return result;
}

}  // namespace xtoken
