"""The oldest versions that training works with, which pip asks for only where `xtoken[train]` is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from torch.torch_version import TorchVersion

OLDEST = {"torch": "2.6", "transformers": "4.57", "accelerate": "1.10"}


def check_versions() -> None:
    """Raises ImportError for a package that is older; the Trainer itself says that accelerate is missing."""
    for name, oldest in OLDEST.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if TorchVersion(found) < oldest:
            raise ImportError(f"xtoken.train needs {name} >= {oldest}, got {found}; run: pip install 'xtoken[train]'")


check_versions()
