// Which vector instructions the kernels use: levels, chosen at run time.
#include "cpu/dispatch.h"

#include <cstdlib>

#include "core/error.h"

namespace xtoken::cpu {
namespace {

constexpr const char* level_names[] = {"portable", "avx2", "avx512"};

bool runs(Level level) {
#if XTOKEN_CPU_X86
    __builtin_cpu_init();
    // Every processor with AVX2 has F16C too; the builtin knows no name for it in older compilers.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (level == Level::avx2) return avx2;
    if (level == Level::avx512) {
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    }
#endif
    return level == Level::portable;
}

Level named_level(const std::string& name, const char* argument) {
    for (const Level level : {Level::portable, Level::avx2, Level::avx512}) {
        if (name != level_names[static_cast<int>(level)]) continue;
        if (!runs(level)) value_error(argument, ": this processor or build cannot run '", name, "' kernels");
        return level;
    }
    value_error(argument, ": expected 'portable', 'avx2' or 'avx512', got '", name, "'");
}

Level environment_level() {
    const char* forced = std::getenv("XTOKEN_CPU_LEVEL");
    if (forced != nullptr && *forced != '\0') return named_level(forced, "XTOKEN_CPU_LEVEL");
    return runs(Level::avx512) ? Level::avx512 : runs(Level::avx2) ? Level::avx2 : Level::portable;
}

}  // namespace

std::vector<std::string> available_levels() {
    std::vector<std::string> names;
    for (const Level level : {Level::portable, Level::avx2, Level::avx512}) {
        if (runs(level)) names.emplace_back(level_names[static_cast<int>(level)]);
    }
    return names;
}

Level level_of(const std::string& name) {
    if (!name.empty()) return named_level(name, "level");
    static const Level chosen = environment_level();
    return chosen;
}

std::string default_level() { return level_names[static_cast<int>(level_of(""))]; }

}  // namespace xtoken::cpu
