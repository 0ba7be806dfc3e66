"""What every public loss shows: where it is found, what its docstring tells, and the same options as a `Teacher`."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable
from typing import Any

import pytest
from harness import OPERATIONS, make_case

import xtoken
from xtoken.losses import registered

get_overloads: Any = getattr(typing, "get_overloads", None)
FACES = [(name, linear) for name in OPERATIONS for linear in (False, True)]
faces = pytest.mark.parametrize(
    ("name", "linear"), FACES, ids=lambda one: one if isinstance(one, str) else ("", "linear")[one]
)


def documented(function: Callable[..., Any]) -> list[str]:
    """The names in the section Parameters of a docstring, in its order."""
    section = inspect.cleandoc(function.__doc__ or "").partition("Parameters\n----------\n")[2].partition("\n\n")[0]
    lines = re.findall(r"^(\w+(?:, \w+)*) : ", section, re.MULTILINE)
    return [name for line in lines for name in line.split(", ")]


@faces
def test_every_parameter_is_documented(name: str, linear: bool) -> None:
    function = OPERATIONS[name].function(linear)
    found, parameters = documented(function), list(inspect.signature(function).parameters)
    assert sorted(found) == sorted(parameters) if linear else found == parameters


@faces
def test_is_exported_under_its_name(name: str, linear: bool) -> None:
    function = OPERATIONS[name].function(linear)
    assert function.__name__ in xtoken.__all__
    assert getattr(xtoken, function.__name__) is function
    assert function.__name__.startswith("linear_") == linear
    assert function.__module__ == registered()[name].__module__


@pytest.mark.parametrize("name", OPERATIONS)
def test_hidden_states_and_output_layer_take_the_place_of_logits(name: str) -> None:
    of_logits, of_hidden = (inspect.signature(OPERATIONS[name].function(linear)).parameters for linear in (False, True))
    assert list(of_logits)[:2] == ["student_logits", "teacher_logits"]
    assert list(of_hidden)[:3] == ["student_hidden", "lm_head_weight", "teacher_logits"]
    assert of_logits.keys() - of_hidden.keys() == {"student_logits", "inplace"}
    assert of_hidden.keys() - of_logits.keys() == {"student_hidden", "lm_head_weight", "bias", "softcap", "logit_scale"}
    for key in of_logits.keys() & of_hidden.keys():
        assert of_hidden[key].default == of_logits[key].default


@faces
def test_an_unknown_argument_is_told_with_the_name_of_what_was_called(name: str, linear: bool) -> None:
    function, case = OPERATIONS[name].function(linear), make_case()
    arguments = *[case.student] * (1 + linear), case.teacher, *OPERATIONS[name].arguments(case)
    unknown = "inplace" if linear else "colour"
    with pytest.raises(TypeError, match=rf"^{function.__name__}\(\) got an unexpected keyword argument '{unknown}'$"):
        function(*arguments, **{unknown: False})


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_teacher_has_the_defaults_of_the_function(name: str) -> None:
    loss, teacher = registered()[name], OPERATIONS[name].teacher(make_case())
    options = loss.options()
    assert (teacher.loss, teacher.options) == (name, {})  # none was given
    assert type(teacher.make_loss()) is loss
    parameters = inspect.signature(loss.function()).parameters
    for key, value in options.items():
        assert parameters[key].default == value == getattr(teacher, key) == getattr(teacher.make_loss(), key)


@pytest.mark.skipif(get_overloads is None, reason="Python 3.10 keeps no overloads")
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_comes_back_is_typed_with_and_without_labels(name: str) -> None:
    without, with_labels = get_overloads(registered()[name].function())
    assert (without.__annotations__["labels"], without.__annotations__["return"]) == ("None", "Tensor")
    assert without.__kwdefaults__ == {"labels": None}
    labelled = with_labels.__annotations__["labels"], with_labels.__annotations__["return"]
    assert labelled == ("Tensor", "tuple[Tensor, Tensor]")
