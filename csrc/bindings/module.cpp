// The Python module xtoken._core: build facts, the one error translator, and the parts.
#include <pybind11/stl.h>

#include "bindings/arrays.h"
#include "bindings/errors.h"
#include "core/cpu_features.h"
#include "core/parallel.h"

namespace xtoken {
namespace {

PYBIND11_MODULE(_core, m) {
    m.doc() = "The C++ core of xtoken; use the functions of the package xtoken instead.";
    register_error_translator();
    m.attr("version") = XTOKEN_VERSION;
    m.attr("compiler") = XTOKEN_COMPILER;
    m.attr("build_type") = XTOKEN_BUILD_TYPE;
    m.def("cpu_features", &cpu_features, "Instruction sets of this processor.");
    m.def("available_processors", &available_processors, "Processors that this process may run on.");
    bind_vocabulary(m);
    bind_align_dp(m);
    bind_aligner(m);
    bind_projection(m);
    bind_piece_index(m);
    bind_cpu(m);
    bind_cpu_gold(m);
    bind_cpu_kd(m);
    bind_cpu_prefix(m);
}

}  // namespace
}  // namespace xtoken
