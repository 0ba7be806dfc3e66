"""Knowledge distillation of language models across tokenizers: alignment, projection, audit, losses.

Importing this package imports nothing else. A module is imported when it is first used, as in ``xtoken.train``; with
the first of the public names, which `xtoken._public` lists, come torch and the losses.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import data as data
    from . import integrations as integrations
    from . import report as report
    from . import train as train
    from ._public import *  # noqa: F403
    from ._public import __all__ as __all__
    from ._public import __version__ as __version__
    from .losses.functions import *  # noqa: F403
else:
    _MODULES = frozenset(one.name for one in pkgutil.iter_modules(__path__)) - {"__main__"}  # noqa: F405
    _FOR_USERS = frozenset({"data", "integrations", "losses", "report", "train"})

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            if name in _FOR_USERS:  # in one order always, since threads may come at once
                importlib.import_module(f"{__name__}._public")
            return importlib.import_module(f"{__name__}.{name}")
        if not name.startswith("__") or name in ("__all__", "__version__"):  # others are asked for by import itself
            public = importlib.import_module(f"{__name__}._public")
            if name in ("__all__", *public.__all__):
                return getattr(public, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_MODULES, *__getattr__("__all__")})
