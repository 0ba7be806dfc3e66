"""The divergences of two distributions that losses take: forward and reverse KL, and mixtures of the two."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xtoken.losses.loss import Loss
from xtoken.losses.numerics import check_number, check_switch


class Divergence(NamedTuple):
    """``teacher sum Q log(Q / M) + student sum P log(P / M)`` with ``M = mixture Q + (1 - mixture) P``.

    Q is the teacher's distribution and P the student's. The forward KL is (1, 0, 0), the reverse (0, 1, 1).
    """

    teacher: float
    student: float
    mixture: float

    @classmethod
    def of(cls, reverse: bool = False, beta: float = 0.0, skew: float = 0.0) -> Divergence:
        """What the options of a loss mean, as `xtoken.losses.call.PARAMETERS` has them; the kernels' parameters.

        At the ends of its range ``beta`` would give 0: 0 is the forward KL, 1 the reverse, which are the limits of the
        mixture, divided by beta and by 1 - beta. Raises ValueError if an option is out of its range, or ``beta`` inside
        its range goes with another option.
        """
        check_switch(reverse, "reverse")
        check_number(beta, "beta")
        check_number(skew, "skew")
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"beta: expected a number from 0 to 1, got {beta!r}")
        if not 0.0 <= skew < 1.0:
            raise ValueError(f"skew: expected a number from 0 to below 1, got {skew!r}")
        if 0.0 < beta < 1.0:
            if reverse or skew:
                raise ValueError(f"beta: expected 0 or 1 with {'reverse' if reverse else 'skew'}, got {beta!r}")
            return cls(beta, 1.0 - beta, beta)
        return cls(0.0, 1.0, 1.0 - skew) if reverse or beta == 1.0 else cls(1.0, 0.0, skew)

    @property
    def reverse(self) -> bool:
        """Whether it is the reverse KL as such."""
        return self.mixture == 1.0

    @property
    def is_mixed(self) -> bool:
        """Whether M is neither P nor Q."""
        return 0.0 < self.mixture < 1.0

    def fields(self) -> dict[str, Any]:
        """What kernels are told of it."""
        return {"reverse": self.reverse, "divergence": self._asdict()}

    def __call__(self, q: Tensor, log_q: Tensor, p: Tensor, log_p: Tensor) -> Tensor:
        """The divergence of distributions [..., n], summed over the last dimension.

        Logarithms are finite; where they are not those of `q` and `p` (a floor was added before), M is made of them.
        """
        if not self.is_mixed:
            first, ahead, behind = (p, log_p, log_q) if self.reverse else (q, log_q, log_p)
            return (first * (ahead - behind)).sum(-1)
        log_m = torch.logaddexp(log_q + math.log(self.mixture), log_p + math.log1p(-self.mixture))
        return (self.teacher * q * (log_q - log_m) + self.student * p * (log_p - log_m)).sum(-1)

    def of_logarithms(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """The same by the logarithms alone, of which only what it needs is exponentiated."""
        none = log_p.new_zeros(())
        q, p = (log.exp() if weight else none for log, weight in ((log_q, self.teacher), (log_p, self.student)))
        return self(q, log_q, p, log_p)


class HasDivergence(Loss):
    """A loss with a temperature and the options of `Divergence.of`."""

    temperature: float
    reverse: bool
    beta: float
    skew: float

    def __post_init__(self) -> None:
        super().__post_init__()
        Divergence.of(self.reverse, self.beta, self.skew)

    @property
    def divergence(self) -> Divergence:
        """Of the two distributions that are compared."""
        return Divergence.of(self.reverse, self.beta, self.skew)

    def arguments(self) -> dict[str, Any]:
        """What formulas are told of it."""
        return {"temperature": self.temperature, "reverse": self.reverse, "beta": self.beta, "skew": self.skew}

    def fields(self) -> dict[str, Any]:
        """What kernels are told of it."""
        return {"temperature": self.temperature, **self.divergence.fields()}
