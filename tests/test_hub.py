"""W and piece indices to a Hub, which is a folder here, and back."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError

from xtoken import PieceIndex, ProjectionMatrix, Vocabulary

STUDENT, TEACHER = Vocabulary([b"1", b"9", b"19", b" a"]), Vocabulary([b"1", b"9", b" ", b"a"])
REAL = {name: getattr(huggingface_hub.HfApi, name) for name in ("create_repo", "create_commit")}
REAL_DOWNLOAD = huggingface_hub.hf_hub_download


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A folder of repositories, and what was asked; arguments must be those of the installed huggingface_hub."""
    asked = SimpleNamespace(folder=tmp_path / "hub", calls=[])

    class Api:
        def __init__(self, token: Any = None) -> None:
            self.token = token

        def create_repo(self, *args: Any, **options: Any) -> Any:
            given = inspect.signature(REAL["create_repo"]).bind(self, *args, **options).arguments
            (asked.folder / given["repo_id"]).mkdir(parents=True, exist_ok=given["exist_ok"])
            asked.calls.append(("create_repo", self.token, given["private"]))
            return SimpleNamespace(repo_id=given["repo_id"])

        def create_commit(self, *args: Any, **options: Any) -> Any:
            given = inspect.signature(REAL["create_commit"]).bind(self, *args, **options).arguments
            for one in given["operations"]:
                with one.as_file() as file:
                    (asked.folder / given["repo_id"] / one.path_in_repo).write_bytes(file.read())
            asked.calls.append(("create_commit", self.token, given["revision"]))
            return SimpleNamespace(commit_url=f"https://hub.example/{given['repo_id']}/commit/1")

    def download(*args: Any, **options: Any) -> str:
        given = inspect.signature(REAL_DOWNLOAD).bind(*args, **options).arguments
        asked.calls.append(("download", given["token"], given["revision"]))
        path = asked.folder / given["repo_id"] / given["filename"]
        if not path.is_file():
            raise EntryNotFoundError(f"404: {path.name}")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_there_and_back(hub: SimpleNamespace) -> None:
    W, pieces = ProjectionMatrix.build(STUDENT, TEACHER), PieceIndex.build(STUDENT, TEACHER)
    url = W.push_to_hub("me/pair", student="meta/S", teacher="T", private=True, token="t", revision="dev")
    assert url == "https://hub.example/me/pair/commit/1"
    assert hub.calls == [("create_repo", "t", True), ("download", "t", "dev"), ("create_commit", "t", "dev")]
    pieces.push_to_hub("me/pair")
    got = ProjectionMatrix.from_pretrained("me/pair", STUDENT, TEACHER, revision="v1", token=False)
    assert hub.calls[-1] == ("download", False, "v1")
    assert got.weight.tolist() == W.weight.tolist()
    assert PieceIndex.from_pretrained("me/pair", STUDENT, TEACHER).data.equal(pieces.data)


def test_the_card(hub: SimpleNamespace) -> None:
    W, pieces = ProjectionMatrix.build(STUDENT, TEACHER), PieceIndex.build(STUDENT, TEACHER)
    W.push_to_hub("me/pair", student="meta/S")
    path = hub.folder / "me" / "pair" / "README.md"
    path.write_text(path.read_text() + "\nMy own words.\n")
    pieces.push_to_hub("me/pair")
    ProjectionMatrix.build(STUDENT, TEACHER, gamma=0.25).push_to_hub("me/pair", teacher="T2")
    card = path.read_text()
    assert card.startswith("---\nlibrary_name: xtoken\n")
    assert card.index("My own words.") < card.index("## `pieces.safetensors`")
    assert (
        card.count("## `projection.safetensors`") == card.count("<!-- xtoken: end of projection.safetensors -->") == 1
    )
    assert "gamma 0.25" in card
    assert "gamma 0.1" not in card
    assert f"* student: fingerprint `{STUDENT.fingerprint()}`" in card
    assert f"* teacher: `T2`, fingerprint `{TEACHER.fingerprint()}`" in card
    assert repr(pieces) in card
    assert 'xtoken.PieceIndex.from_pretrained("me/pair", student_tok, teacher_tok)' in card


def test_what_is_verified(hub: SimpleNamespace) -> None:
    ProjectionMatrix.build(STUDENT, TEACHER).push_to_hub("me/pair")
    with pytest.raises(ValueError, match="projection: built for another teacher"):
        ProjectionMatrix.from_pretrained("me/pair", STUDENT, STUDENT)
    path = hub.folder / "me" / "pair" / "projection.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"projection\.safetensors"):
        ProjectionMatrix.from_pretrained("me/pair")
    with pytest.raises(EntryNotFoundError):
        PieceIndex.from_pretrained("me/pair")


def test_names_are_one_line(hub: SimpleNamespace) -> None:
    for name in ("a\nb", "`", " "):
        with pytest.raises(ValueError, match="teacher: expected a name of a tokenizer in one line"):
            ProjectionMatrix.build(STUDENT, TEACHER).push_to_hub("me/pair", teacher=name)
    assert hub.calls == []


def test_folders(tmp_path: Path) -> None:
    pieces = PieceIndex.build(STUDENT, TEACHER)
    pieces.save_pretrained(tmp_path / "new")
    assert PieceIndex.from_pretrained(tmp_path / "new", STUDENT, TEACHER).data.equal(pieces.data)
    for source, message in ((tmp_path, "no pieces.safetensors in"), ("./nope", "no such file or folder: ./nope")):
        with pytest.raises(FileNotFoundError, match=f"^source: {message}"):
            PieceIndex.from_pretrained(source)
