// NumPy arrays in and out without copies.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/projection.h"

namespace xtoken {

namespace py = pybind11;

// A C-contiguous array argument of exactly this type; other integer types are cast, others are refused.
template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// Hands a vector over to NumPy as an array of T, or with `columns` > 0 as a matrix of rows of that many T,
// one for each element of the vector.
template <typename T, typename Element>
py::array_t<T> to_array(std::vector<Element>&& values, py::ssize_t columns = 0) {
    auto* owned = new std::vector<Element>(std::move(values));
    py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<Element>*>(p); });
    const auto* data = reinterpret_cast<const T*>(owned->data());
    const auto count = static_cast<py::ssize_t>(owned->size());
    if (columns == 0) return py::array_t<T>(count, data, owner);
    return py::array_t<T>({count, columns}, data, owner);
}

// Copies a one-dimensional array into a vector.
template <typename T>
std::vector<T> to_vector(const Array<T>& array, const char* name) {
    if (array.ndim() != 1) value_error(name, ": expected one dimension, got ", array.ndim());
    return std::vector<T>(array.data(), array.data() + array.size());
}

// Token sequences of a Python caller, checked: `count` of them, ids within the vocabulary.
Sequences to_sequences(const Array<int64_t>& ptr, const Array<int32_t>& ids, size_t count, int32_t vocabulary_size);

void bind_vocabulary(py::module_& m);
void bind_align_dp(py::module_& m);
void bind_aligner(py::module_& m);
void bind_projection(py::module_& m);
void bind_piece_index(py::module_& m);

}  // namespace xtoken
