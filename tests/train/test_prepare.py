"""W, audits and pieces in the cache folder."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from default_losses import DEFAULT, OTHER

from xtoken import PieceIndex, ProjectionMatrix, Vocabulary
from xtoken.losses import Needs
from xtoken.train import prepare
from xtoken.train.prepare import build_objective, cache_folder, cached, cached_audit, cached_choice

cached_projection = functools.partial(cached, ProjectionMatrix)
cached_pieces = functools.partial(cached, PieceIndex)


@pytest.fixture
def pair(student_tok, teacher_tok) -> tuple[Vocabulary, Vocabulary]:
    return Vocabulary.from_tokenizer(student_tok), Vocabulary.from_tokenizer(teacher_tok)


def test_projection_is_built_once(pair, tmp_path, monkeypatch):
    first = cached_projection(*pair, tmp_path, gamma=0.2)
    (path,) = tmp_path.iterdir()
    assert torch.equal(first.weight, ProjectionMatrix.build(*pair, gamma=0.2).weight)
    monkeypatch.setattr(ProjectionMatrix, "build", None)
    assert torch.equal(cached_projection(*pair, tmp_path, gamma=0.2).weight, first.weight)
    monkeypatch.undo()
    assert not torch.equal(cached_projection(*pair, tmp_path, gamma=0.1).weight, first.weight)
    assert cached_projection(pair[1], pair[0], tmp_path).shape == (len(pair[1]), len(pair[0]))
    assert len(list(tmp_path.iterdir())) == 3
    path.write_bytes(path.read_bytes()[:100])  # damaged
    assert torch.equal(cached_projection(*pair, tmp_path, gamma=0.2).weight, first.weight)
    assert len(path.read_bytes()) > 100


def test_a_cache_that_is_no_folder_is_found_before_anything_is_made(pair, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("")
    monkeypatch.setattr(ProjectionMatrix, "build", None)
    for folder in (tmp_path / "cache", tmp_path / "cache" / "below"):
        with pytest.raises(NotADirectoryError, match=r"cache: expected a folder, but .*/cache is a file"):
            cached_projection(*pair, folder)


def test_audit_is_made_once(pair, tmp_path, monkeypatch):
    projection = ProjectionMatrix.build(*pair)
    first = cached_audit(*pair, projection, tmp_path)
    monkeypatch.setattr(prepare, "coverage_audit", None)
    assert cached_audit(*pair, projection, tmp_path) == first
    monkeypatch.undo()
    (path,) = tmp_path.iterdir()
    path.write_text('{"classes": {}}')
    assert cached_audit(*pair, projection, tmp_path) == first


def test_pieces_are_made_once(pair, tmp_path, monkeypatch):
    back = pair[::-1]
    first, choice = cached_pieces(*back, tmp_path), cached_choice(*back, tmp_path)
    monkeypatch.setattr(PieceIndex, "build", None)
    assert torch.equal(cached_pieces(*back, tmp_path).data, first.data)
    assert cached_choice(*back, tmp_path) == choice
    _, reasons = build_objective(*back, loss=DEFAULT[Needs.PIECES], cache=tmp_path)
    assert first.merged().summary() in reasons
    monkeypatch.undo()
    objective, _ = build_objective(*back, loss=DEFAULT[Needs.PIECES], cache=tmp_path, texts=["one text more"])
    assert objective.pieces.merged().texts == first.merged().texts + 1


def test_choice(pair, tmp_path):
    choice = cached_choice(*pair, tmp_path, gamma=0.2)
    assert (choice.loss, choice.paper) == (DEFAULT[Needs.PIECES], DEFAULT[Needs.PROJECTION])
    assert any("digits_3" in reason for reason in choice.report.reasons)
    assert cached_choice(*pair, tmp_path, gamma=0.2, learn_projection=True).loss == choice.paper
    assert len(list(tmp_path.iterdir())) == 2
    assert cached_choice(pair[0], pair[0], tmp_path).loss == DEFAULT[Needs.SAME_TOKENIZER]
    assert len(list(tmp_path.iterdir())) == 2  # which needs neither
    assert cached_choice(pair[1], pair[0], tmp_path).loss == OTHER  # the single digits are tokens on both sides
    assert len(list(tmp_path.iterdir())) == 5  # and of pieces, which say how differently both cut


def test_folder(monkeypatch):
    monkeypatch.setenv("XTOKEN_CACHE", "/here")
    assert cache_folder() == Path("/here")
    monkeypatch.delenv("XTOKEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert cache_folder() == Path("/there/xtoken")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "xtoken"
