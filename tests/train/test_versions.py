"""What training needs is what its extra asks for, and is said where something is older."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from xtoken.train import versions


def test_they_are_those_of_the_extra() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (extra,) = re.findall(r"^train = \[(.*)\]$", project, re.MULTILINE)
    assert dict(re.findall(r'"(\w+)>=([\d.]+)"', extra)) == versions.OLDEST


@pytest.mark.parametrize(("found", "is_enough"), [("4.9.2", False), ("4.56.2", False), ("4.57.0", True), ("5.0", True)])
def test_older_ones_are_told(found: str, is_enough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda name: found if name == "transformers" else "99.0")
    if is_enough:
        versions.check_versions()
        return
    with pytest.raises(ImportError, match=rf"needs transformers >= 4\.57, got {found}; run: pip install 'xtoken\[tr"):
        versions.check_versions()
