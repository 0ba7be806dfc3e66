// Which vector instructions the kernels use: levels, chosen at run time.
#pragma once

#include <string>
#include <vector>

#include "launch/fields.h"

// x86-64 with a compiler that takes instruction sets per file: kernels exist for all levels, elsewhere portable only.
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define XTOKEN_CPU_X86 1
#else
#define XTOKEN_CPU_X86 0
#endif

namespace xtoken::cpu {

enum class Level { portable, avx2, avx512 };

// The names of the levels that this processor can run, slowest first.
std::vector<std::string> available_levels();

// The level of that name; "" is the default: the environment variable XTOKEN_CPU_LEVEL as it was at the first call, or
// the fastest. Throws for names that do not exist and levels that this processor or build does not have.
Level level_of(const std::string& name);

// The default level's name.
std::string default_level();

// How kernels are to run: `threads`, the caller being one.
struct Launch {
    Level level;
    int threads;
};
using Launcher = xtoken::Launcher<Launch>;

}  // namespace xtoken::cpu

// Declares a kernel that is compiled once per level, each in a namespace of its own (see simd.h). In namespace
// xtoken::cpu: XTOKEN_KERNEL(void, name, (const Params& params)); then call XTOKEN_PICK(level, name)(params).
#if XTOKEN_CPU_X86
#define XTOKEN_KERNEL(result, name, parameters) \
    namespace portable {                        \
    result name parameters;                     \
    }                                           \
    namespace avx2 {                            \
    result name parameters;                     \
    }                                           \
    namespace avx512 {                          \
    result name parameters;                     \
    }
#define XTOKEN_PICK(level, name)                                           \
    ((level) == ::xtoken::cpu::Level::avx512 ? ::xtoken::cpu::avx512::name \
     : (level) == ::xtoken::cpu::Level::avx2 ? ::xtoken::cpu::avx2::name   \
                                             : ::xtoken::cpu::portable::name)
#else
#define XTOKEN_KERNEL(result, name, parameters) \
    namespace portable {                        \
    result name parameters;                     \
    }
#define XTOKEN_PICK(level, name) ((void)(level), ::xtoken::cpu::portable::name)
#endif
