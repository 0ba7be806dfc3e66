// Launchers and builders by name for Python: what the modules _core and _cuda share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <memory>

#include "launch/fields.h"

namespace xtoken {

namespace py = pybind11;

// Parameters in memory, and what reads them from a dict. Values are None, numbers, names, dicts of fields, things that
// a builder has made, and arrays as tuples (address, element type, shape, strides, ...); what else a tuple holds is the
// caller's, to keep the memory alive.
class Params {
  public:
    template <typename Registered>
    Params(const Registered& registered, const py::dict& fields) : Params(registered.size) {
        read(registered.name, registered.read, fields);
    }
    const void* get() const { return memory_.get(); }

  private:
    explicit Params(size_t size);
    void read(const char* name, void (*reader)(Reader&, void*), const py::dict& fields);

    std::unique_ptr<std::max_align_t[]> memory_;
};

// Calls a launcher, without the GIL.
template <typename Launch>
void launch_named(const std::string& name, const py::dict& fields, const Launch& launch) {
    const Launcher<Launch>& launcher = Registry<Launcher<Launch>>::named(name);
    const Params params(launcher, fields);
    py::gil_scoped_release release;
    launcher.run(params.get(), launch);
}

// The class of what builders make.
void bind_built(py::module_& m);

}  // namespace xtoken
