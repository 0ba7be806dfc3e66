// The Python module xtoken._cuda: the launchers of the CUDA kernels.
#include <cuda_runtime_api.h>

#include "bindings/errors.h"
#include "bindings/launch.h"
#include "core/error.h"
#include "launch/arguments.h"

#ifndef XTOKEN_CUDA_MODULE
#define XTOKEN_CUDA_MODULE _cuda
#endif

namespace xtoken {
namespace {

void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw Error(Error::Kind::runtime, std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes a device the current one of this module's runtime, which is linked in and does not know torch's; then the one
// before again.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "device");
        changed_ = device != before_;
        if (changed_) check(cudaSetDevice(device), "device");
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_ = 0;
    bool changed_ = false;
};

int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "device");
    return value;
}

PYBIND11_MODULE(XTOKEN_CUDA_MODULE, m) {
    m.doc() = "The CUDA kernels of xtoken; use the losses of the package xtoken instead.";
    register_error_translator();
    bind_built(m);
    m.attr("max_threads") = cuda::max_threads;
    m.attr("resident_blocks") = cuda::resident_blocks;
    m.attr("cuda_version") = CUDART_VERSION;
#ifdef XTOKEN_CUDA_ARCHITECTURES
    m.attr("architectures") = XTOKEN_CUDA_ARCHITECTURES;
#endif
    m.def(
        "driver_version",
        [] {
            int version = 0;
            check(cudaDriverGetVersion(&version), "driver");
            return version;
        },
        "The newest CUDA that the driver supports, as CUDART_VERSION; 0: there is no driver.");
    m.def(
        "compute_capability",
        [](int device) {
            return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                   attribute(cudaDevAttrComputeCapabilityMinor, device);
        },
        py::arg("device"), "Of a device by its number: 80 for 8.0.");
    m.def(
        "launch",
        [](const std::string& name, const py::dict& fields, int32_t blocks, int32_t threads, uintptr_t stream,
           int device) {
            const OnDevice current(device);
            launch_named(name, fields, cuda::Launch{blocks, threads, reinterpret_cast<void*>(stream)});
        },
        py::arg("name"), py::arg("fields"), py::arg("blocks"), py::arg("threads"), py::arg("stream"), py::arg("device"),
        "Starts the kernel of that name on a stream of a device.");
    m.def(
        "workspace",
        [](const std::string& name, const py::dict& fields, int device) {
            const OnDevice current(device);
            const cuda::Launcher& launcher = Registry<cuda::Launcher>::named(name);
            return launcher.workspace(Params(launcher, fields).get());
        },
        py::arg("name"), py::arg("fields"), py::arg("device"),
        "Floats of workspace that a block of that kernel needs on a device.");
}

}  // namespace
}  // namespace xtoken
