// Launchers of the vector functions on arrays.
#include "cpu/simd_kernel.h"

namespace xtoken::cpu {
namespace {

const Launcher exp_launcher(
    "exp", +[](const ExpParams& params, const Launch& launch) { XTOKEN_PICK(launch.level, exp_array)(params); });
const Launcher log_launcher(
    "log", +[](const LogParams& params, const Launch& launch) { XTOKEN_PICK(launch.level, log_array)(params); });
const Launcher to_launcher(
    "to_float",
    +[](const ToFloatParams& params, const Launch& launch) { XTOKEN_PICK(launch.level, to_float)(params); });
const Launcher from_launcher(
    "from_float",
    +[](const FromFloatParams& params, const Launch& launch) { XTOKEN_PICK(launch.level, from_float)(params); });

}  // namespace
}  // namespace xtoken::cpu
