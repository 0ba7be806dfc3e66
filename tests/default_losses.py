"""Losses by what they need: tests of other parts take one as an example, and name none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xtoken.losses import Needs, registered

DEFAULT = {
    needs: next((name for name, loss in registered().items() if loss.needs is needs and loss.is_default), "")
    or next(name for name, loss in registered().items() if loss.needs is needs)
    for needs in Needs
}
"""The loss of a `Teacher` that says no more; where it has to, the first of them."""

OTHER = next(
    name for name, loss in registered().items() if loss.needs is Needs.PROJECTION and name != DEFAULT[Needs.PROJECTION]
)
"""Another loss of a projection."""


def default_loss(needs: Needs) -> Callable[..., Any]:
    """The public function of `DEFAULT[needs]`."""
    return registered()[DEFAULT[needs]].function()
