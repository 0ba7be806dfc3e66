"""The demo, shortened, on its real teacher and tokenizers."""

from __future__ import annotations

import functools
import math

import pytest
from default_losses import DEFAULT
from real_tokenizers import plain_arrays

from xtoken import demo
from xtoken.losses import Needs


@pytest.mark.slow
def test_demo_runs_and_learns(capsys, monkeypatch):
    """On some short passages. transformers parses the teacher's file three times, and makes the names of its weights
    again for every module, which were a third of all the time here."""
    import gguf

    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
    training, held_out = demo.manual_passages(160)
    monkeypatch.setattr(demo, "manual_passages", lambda: (training[:200], held_out))
    distilled = f"{DEFAULT[Needs.PIECES]} + cross-entropy"
    with plain_arrays():
        results = demo.run(steps=6, batch_size=2, held_out_passages=2)
    printed = capsys.readouterr().out
    assert list(results) == ["before", "cross-entropy only", distilled]
    assert results["before"]["ce"] == pytest.approx(math.log(128256), abs=0.5)
    for name in (distilled, "cross-entropy only"):
        assert results[name]["ce"] < results["before"]["ce"]
        assert results[name]["tokens_per_second"] > 0
    assert results[distilled]["kd"] < results["before"]["kd"]
    rule, recommended = DEFAULT[Needs.PROJECTION], DEFAULT[Needs.PIECES]
    assert printed.index(f"the paper's rule: {rule}") < printed.index(f"recommended loss: {recommended}")
    assert "1|9|9" in printed  # the teacher's digits under the student's "199"


def test_passages_are_apart():
    training, held_out = demo.manual_passages()
    assert len(training) > 1000
    assert len(held_out) > 50
    lines = {line.strip() for passage in training for line in passage.splitlines() if line.strip()}
    assert not lines & {line.strip() for passage in held_out for line in passage.splitlines()}


def test_missing_package_is_named():
    with pytest.raises(ImportError, match=r"no-such-package is not installed; run: pip install"):
        demo.package_folder("no_such_package")
