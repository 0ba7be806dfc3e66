"""A loss from outside of the package, in a module that is no package itself; and what cannot be registered."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from comparer import assert_close
from torch import Tensor

from xtoken import Teacher
from xtoken.alignment import Chunks
from xtoken.losses import Loss, Needs, register, registered
from xtoken.losses.call import compute
from xtoken.losses.cases import changes
from xtoken.losses.loss import REGISTER, Matrix


@dataclass(frozen=True)
class Distance(Loss):
    """A loss of somebody else, in a module that is no package."""

    power: int

    def losses(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None = None) -> Tensor:
        p, q = student[chunks.student.start].softmax(-1), teacher[chunks.teacher.start].softmax(-1)
        return (p - q).abs().pow(self.power).sum(-1)


def public(*logits: Any, power: int = 2) -> None:
    """What `Distance.function` finds, by the name of this module; it is called by nobody."""


public.__test__ = False  # type: ignore[attr-defined]
test_outside_loss = public


@pytest.fixture
def distance() -> Iterator[type[Distance]]:
    yield register("a_distance_of_the_tests", "distance", Needs.SAME_TOKENIZER)(Distance)
    del REGISTER["a_distance_of_the_tests"]


def test_a_loss_from_outside_runs_everywhere(distance: type[Distance]) -> None:
    student, teacher = torch.randn(2, 5, 7).requires_grad_(), torch.randn(2, 5, 7)
    want = (student.softmax(-1) - teacher.softmax(-1)).square().sum(-1)
    options: dict[str, Any] = {"labels": None, "sizes": (7, 7), "backend": "auto"}
    for _ in range(2):
        got = compute(distance(2), student, teacher, None, reduction="none", **options)
        assert got.shape == (2, 5)
        assert_close(got, want, rtol=1e-5)
    assert Teacher(loss="a_distance_of_the_tests").loss == "a_distance_of_the_tests"
    (grad,) = torch.autograd.grad(compute(distance(2), student, teacher, None, reduction="sum", **options), student)
    assert_close(grad, *torch.autograd.grad(want.sum(), student), rtol=1e-4, atol=1e-6)


def test_what_cannot_be_registered() -> None:
    @dataclass(frozen=True)
    class Taken(Loss):
        reduction: str

    @dataclass(frozen=True)
    class Odd(Loss):
        table: dict[str, int]

    @dataclass(frozen=True)
    class Unreachable(Loss):
        weight: float

    @dataclass(frozen=True)
    class Nameless(Loss):
        title: str

    @dataclass(frozen=True)
    class Twice(Loss):
        W: Matrix
        W_col: int

    class Plain(Loss):
        pass

    for loss, message in (
        (Taken, "Taken.reduction: expected another name"),
        (Unreachable, "Unreachable.weight: expected another name"),
        (Nameless, "Nameless.title: expected another name"),
        (Twice, "Twice.W_col: expected another name"),
        (Odd, "Odd.table: expected one of"),
        (Plain, "expected a dataclass of xtoken.losses.Loss"),
    ):
        with pytest.raises(TypeError, match=message):
            register("new", "new", Needs.NOTHING)(loss)
    with pytest.raises(TypeError, match="Distance: expected a field 'W', since it needs a projection matrix"):
        register("new", "new", Needs.PROJECTION)(Distance)
    for name in (next(iter(registered())), "add_cross_entropy_", "a name", "class", "auto"):
        with pytest.raises(ValueError, match="name: expected an identifier that no loss or operator has yet"):
            register(name, "new", Needs.NOTHING)(Distance)
    assert "new" not in registered()


@dataclass(frozen=True)
class Switched(Loss):
    """A loss that does not look at its options itself."""

    is_squared: bool


def test_losses_of_one_module_have_functions_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named as the losses are: else one would get the other's options."""
    module = sys.modules[__name__]
    for name, loss in (("squared_of_the_tests", Switched), ("power_of_the_tests", Distance)):
        monkeypatch.setitem(REGISTER, name, loss)  # so that it is not there afterwards
        del REGISTER[name]
        register(name, name, "nothing")(loss)
    assert Switched.needs is Needs.NOTHING
    with pytest.raises(TypeError, match="Switched: expected its public function squared_of_the_tests_loss beside it"):
        Teacher(loss="squared_of_the_tests")
    monkeypatch.setattr(module, "squared_of_the_tests_loss", lambda *, is_squared=True: None, raising=False)
    monkeypatch.setattr(module, "power_of_the_tests_loss", lambda *, power=3: None, raising=False)
    assert Teacher(loss="power_of_the_tests").power == 3
    assert Teacher(loss="squared_of_the_tests").is_squared is True
    with pytest.raises(TypeError, match="is_squared: expected True or False, got str"):
        Teacher(loss="squared_of_the_tests", is_squared="no")
    assert Switched.kinds() == {"is_squared": (bool,)}
    assert changes(Switched) == {"is_squared": (False,)}
