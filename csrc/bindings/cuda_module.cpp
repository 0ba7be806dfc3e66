// The Python module xtoken._cuda: the launchers of the CUDA kernels.
#include <cuda_runtime_api.h>

#include "bindings/errors.h"
#include "bindings/launch.h"
#include "launch/arguments.h"

#ifndef XTOKEN_CUDA_MODULE
#define XTOKEN_CUDA_MODULE _cuda
#endif

namespace xtoken {
namespace {

PYBIND11_MODULE(XTOKEN_CUDA_MODULE, m) {
    m.doc() = "The CUDA kernels of xtoken; use the losses of the package xtoken instead.";
    register_error_translator();
    bind_built(m);
    m.attr("max_threads") = cuda::max_threads;
    m.attr("cuda_version") = CUDART_VERSION;
#ifdef XTOKEN_CUDA_ARCHITECTURES
    m.attr("architectures") = XTOKEN_CUDA_ARCHITECTURES;
#endif
    m.def(
        "launch",
        [](const std::string& name, const py::dict& fields, int32_t blocks, int32_t threads, uintptr_t stream) {
            launch_named(name, fields, cuda::Launch{blocks, threads, reinterpret_cast<void*>(stream)});
        },
        py::arg("name"), py::arg("fields"), py::arg("blocks"), py::arg("threads"), py::arg("stream"),
        "Starts the kernel of that name on a stream.");
    m.def(
        "workspace",
        [](const std::string& name, const py::dict& fields) {
            const cuda::Launcher& launcher = Registry<cuda::Launcher>::named(name);
            return launcher.workspace(Params(launcher, fields).get());
        },
        py::arg("name"), py::arg("fields"), "Floats of workspace that a block of that kernel needs.");
}

}  // namespace
}  // namespace xtoken
