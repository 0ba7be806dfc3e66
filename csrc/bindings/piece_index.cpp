// Bindings of core/piece_index.h.
#include "core/piece_index.h"

#include "bindings/arrays.h"

namespace xtoken {

void bind_piece_index(py::module_& m) {
    m.def(
        "partners",
        [](const Vocabulary& student, const Vocabulary& teacher) {
            Partners found = partners(student, teacher);
            return py::make_tuple(to_array<int32_t>(std::move(found.student)),
                                  to_array<int32_t>(std::move(found.teacher)));
        },
        py::arg("student"), py::arg("teacher"));

    m.def(
        "build_piece_index",
        [](const Vocabulary& student, const Vocabulary& teacher, const Array<int32_t>& student_rows,
           const Array<int64_t>& student_ptr, const Array<int32_t>& student_ids, const Array<int32_t>& teacher_rows,
           const Array<int64_t>& teacher_ptr, const Array<int32_t>& teacher_ids) {
            const auto s_rows = to_vector(student_rows, "student_rows"),
                       t_rows = to_vector(teacher_rows, "teacher_rows");
            return to_array<int32_t>(build_piece_index(
                student, teacher, s_rows, to_sequences(student_ptr, student_ids, s_rows.size(), teacher.size()), t_rows,
                to_sequences(teacher_ptr, teacher_ids, t_rows.size(), student.size())));
        },
        py::arg("student"), py::arg("teacher"), py::arg("student_rows"), py::arg("student_ptr"), py::arg("student_ids"),
        py::arg("teacher_rows"), py::arg("teacher_ptr"), py::arg("teacher_ids"));

    m.def(
        "merge_events",
        [](const Array<int32_t>& data, const Array<int32_t>& event_of) {
            return to_array<int32_t>(
                merge_events(data.data(), static_cast<size_t>(data.size()), to_vector(event_of, "event_of")));
        },
        py::arg("data"), py::arg("event_of"));

    m.def(
        "check_piece_index",
        [](const Array<int32_t>& data) { PieceIndex::view(data.data(), static_cast<size_t>(data.size()), true); },
        py::arg("data"));

    m.def(
        "inner_boundaries",
        [](const Array<int32_t>& data, const Array<int64_t>& student_start, const Array<int64_t>& student_count,
           const Array<int64_t>& student_next, const Array<int64_t>& teacher_start, const Array<int64_t>& teacher_count,
           const Array<int64_t>& teacher_next) {
            const PieceIndex index = PieceIndex::view(data.data(), static_cast<size_t>(data.size()), true);
            const auto chunks = student_start.size();
            if (student_start.ndim() != 1 || student_count.size() != chunks || teacher_start.size() != chunks ||
                teacher_count.size() != chunks) {
                value_error("chunks: expected one start and one count a chunk on both sides");
            }
            return to_array<int64_t>(
                inner_boundaries(
                    index, static_cast<size_t>(chunks),
                    {student_start.data(), student_count.data(), student_next.data(), student_next.size()},
                    {teacher_start.data(), teacher_count.data(), teacher_next.data(), teacher_next.size()}),
                sizeof(InnerBoundary) / sizeof(int64_t));
        },
        py::arg("data"), py::arg("student_start"), py::arg("student_count"), py::arg("student_next"),
        py::arg("teacher_start"), py::arg("teacher_count"), py::arg("teacher_next"));
}

}  // namespace xtoken
