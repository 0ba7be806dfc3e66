// The one translator of the core's errors to Python's.
#pragma once

#include <pybind11/pybind11.h>

#include "core/error.h"

namespace xtoken {

inline void register_error_translator() {
    pybind11::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const Error& error) {
            switch (error.kind()) {
                case Error::Kind::value:
                    return pybind11::set_error(PyExc_ValueError, error.what());
                case Error::Kind::type:
                    return pybind11::set_error(PyExc_TypeError, error.what());
                case Error::Kind::runtime:
                    return pybind11::set_error(PyExc_RuntimeError, error.what());
            }
        }
    });
}

}  // namespace xtoken
