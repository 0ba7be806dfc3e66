"""The one cache of what is made of tensors: what is used again, and when it is made anew."""

from __future__ import annotations

import gc
import weakref

import emulated
import pytest
import torch
from fake_device import DEVICE, fake_device

from xtoken.losses.cached import Cached
from xtoken.losses.columns import select_columns
from xtoken.losses.logits import DenseSource


class Made:
    """Something whose end can be seen."""


def test_same_tensors_and_keys_are_made_once() -> None:
    cache = Cached[Made]()
    a, b = torch.zeros(2), torch.zeros(3)
    first = cache.of((a, b), Made, "cpu", (1, 2))
    assert cache.of((a, b), Made, "cpu", (1, 2)) is first
    other = cache.of((a, b), Made, "cuda", (1, 2))
    assert other is not first
    assert cache.of((a, b), Made, "cpu", (1, 2)) is first  # one for each value of the keys
    assert cache.of((b, a), Made, "cpu", (1, 2)) is not first


@pytest.mark.parametrize("which", [0, 1])
def test_a_change_in_place_makes_it_anew(which: int) -> None:
    cache = Cached[Made]()
    tensors = torch.zeros(2), torch.zeros(3)
    first = cache.of(tensors, Made)
    tensors[which].add_(0)
    second = cache.of(tensors, Made)
    assert second is not first
    assert cache.of(tensors, Made) is second


def test_equal_tensors_are_not_the_same() -> None:
    cache = Cached[Made]()
    a, b = torch.zeros(2), torch.zeros(3)
    first = cache.of((a, b), Made)
    assert cache.of((a.clone(), b), Made) is not first
    assert cache.of((a, b.clone()), Made) is not first
    assert cache.of((a,), Made, "alone") is not first


def test_it_lives_as_long_as_the_first_tensor() -> None:
    cache = Cached[Made]()
    a, b = torch.zeros(2), torch.zeros(3)
    made = weakref.ref(cache.of((a, b), Made))
    del b
    gc.collect()
    assert made() is not None
    del a
    gc.collect()
    assert made() is None


def test_an_error_leaves_nothing_behind() -> None:
    cache = Cached[Made]()
    tensor = torch.zeros(2)

    def fail() -> Made:
        raise RuntimeError("no plan")

    with pytest.raises(RuntimeError, match="no plan"):
        cache.of((tensor,), fail)
    assert cache.of((tensor,), Made) is cache.of((tensor,), Made)


ONE = torch.ones(1)


def test_tensors_of_inference_mode() -> None:
    with torch.inference_mode():
        tensor = torch.zeros(2)
    cache = Cached[Made]()  # they may be changed without a trace
    assert cache.of((tensor,), Made) is not cache.of((tensor,), Made)
    with torch.inference_mode():
        made = Cached[torch.Tensor]().of((torch.zeros(2).clone(),), lambda: torch.ones(3))
        kept = Cached[torch.Tensor]().of((ONE,), lambda: torch.ones(3))
    assert made.is_inference()
    assert not kept.is_inference()  # so that what is made of it can be kept, too


@pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
def test_columns_chosen_on_a_device_do_not_outlive_their_step() -> None:
    teacher = torch.randn(1, 5, 23)
    with fake_device():
        source = DenseSource(teacher.to(DEVICE), 23)
        columns = select_columns(source, 23, top_k=9, device=DEVICE)
        assert select_columns(source, 23, columns=columns, device=DEVICE) is columns  # not looked at again
        alive = weakref.ref(columns)
        del columns
        gc.collect()
        assert alive() is None
