"""What is made of tensors, kept while they live and have not changed: one rule for plans, layouts and copies."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from xtoken import _core

T = TypeVar("T")
P = ParamSpec("P")


@dataclass(frozen=True)
class _Kept(Generic[T]):
    others: tuple[weakref.ref[Tensor], ...]  # all tensors but the first, which is the key
    versions: tuple[Any, ...]
    made: T

    def of(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether it was made of these very tensors as they are now."""
        same = all(ref() is tensor for ref, tensor in zip(self.others, tensors[1:], strict=True))
        return same and self.versions == _versions(tensors)


def _versions(tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Of the contents, and of where and what they are, which an assignment to ``data`` changes."""
    return tuple((x._version, x.data_ptr(), x.dtype, x.shape, x.stride(), _DIGESTS.get(x)) for x in tensors)


_DIGESTS: Any = WeakIdKeyDictionary()
"""Of the contents of tensors, when `notice_changes` last looked at them."""


def notice_changes(*tensors: Tensor | None) -> None:
    """Sees changes in place that torch does not count, made through ``data`` or NumPy: by what tensors on the CPU hold.

    Others would have to be waited for, and those of inference mode are not kept.
    """
    for x in tensors:
        if x is None or x.device.type != "cpu" or x.is_inference() or x.grad_fn is not None:
            continue
        _DIGESTS[x] = _core.digest(x.detach().contiguous().flatten().view(torch.uint8).numpy())


def made_to_last(make: Callable[[], T]) -> T:
    """`make()` outside of inference mode, whose tensors do not tell whether they were changed."""
    if not torch.is_inference_mode_enabled():
        return make()
    with torch.inference_mode(False), torch.no_grad():
        return make()


class Cached(Generic[T]):
    """Results by the tensors that they were made of.

    A result is kept for as long as the first of its tensors lives, one for each value of the further keys (a device,
    a shape). It is used again if all tensors are the same objects and none was changed in place since. Nothing here
    looks at the values of a tensor, so nothing waits for a device. Of tensors of inference mode, which do not tell
    whether they were changed, nothing is kept.
    """

    def __init__(self) -> None:
        self._kept: Any = WeakIdKeyDictionary()

    def of(self, tensors: tuple[Tensor, ...], make: Callable[[], T], *keys: Hashable) -> T:
        """`make()`, or what it returned for these tensors, unchanged, and equal `keys`."""
        if any(tensor.is_inference() for tensor in tensors):
            return make()
        kept: dict[tuple[Hashable, ...], _Kept[T]] = self._kept.setdefault(tensors[0], {})
        known = kept.get(keys)
        if known is None or not known.of(tensors):
            made = made_to_last(make)  # first, so that an error leaves the cache as it is
            known = kept[keys] = _Kept(tuple(map(weakref.ref, tensors[1:])), _versions(tensors), made)
        return known.made


def kept(function: Callable[P, T]) -> Callable[P, T]:
    """A function whose results are `Cached` by the tensors among its arguments; the others are further keys."""
    results = Cached[T]()

    @functools.wraps(function)
    def look_up(*args: P.args, **kwargs: P.kwargs) -> T:
        tensors = tuple(one for one in args if isinstance(one, Tensor))
        keys = (one for one in args if not isinstance(one, Tensor))
        return results.of(tensors, functools.partial(function, *args, **kwargs), *keys, *kwargs.items())

    return look_up
