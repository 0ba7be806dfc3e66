"""W and piece indices on the Hub: a file and its section of the repository's card, in one commit."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from . import _core
from .vocabulary import TokenizerLike
from .vocabulary.sources import check_source

Kept = TypeVar("Kept", bound="OnHub")

CARD = "README.md"

HEADER = f"""\
---
library_name: xtoken
tags:
- xtoken
- knowledge-distillation
- tokenizers
---
# Of two tokenizers, for distillation with xtoken

Written by xtoken {_core.version}. The files hold numbers and texts of tokens, no code and no pickle.
"""


class OnHub:
    """What is kept in one file of a folder or of a repository of the Hub, and belongs to two tokenizers."""

    FILE_NAME: ClassVar[str]
    TITLE: ClassVar[str]
    """What the card says that it is."""

    metadata: dict[str, str]

    def facts(self) -> list[str]:
        """What the card says of it beside the tokenizers."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file."""
        raise NotImplementedError

    @classmethod
    def load(
        cls: type[Kept], path: str | os.PathLike[str], student_tok: TokenizerLike = None,
        teacher_tok: TokenizerLike = None,
    ) -> Kept:  # fmt: skip
        """Reads and checks a file."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the file, under the name that the Hub has for it, into `folder`, which is made if need be."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.save(Path(folder) / self.FILE_NAME)

    @classmethod
    def from_pretrained(
        cls: type[Kept],
        source: str | os.PathLike[str],
        student_tok: TokenizerLike = None,
        teacher_tok: TokenizerLike = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Kept:
        """Reads that file from a folder or from a repository of the Hub; see `load`.

        `revision` and `token` are those of `huggingface_hub.hf_hub_download`. Raises FileNotFoundError if a folder is
        not there or has no such file.
        """
        return cls.load(fetch(source, cls.FILE_NAME, revision, token), student_tok, teacher_tok)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        student: str | None = None,
        teacher: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
    ) -> str:
        """Commits the file and its section of the card to a repository of the Hub, made if need be.

        A section of before is replaced, and all else of the card stays. `student` and `teacher` are names of the
        tokenizers for the card, which has their fingerprints in any case; `private`, `token` and `revision` are those
        of `huggingface_hub.HfApi`. Returns the commit's URL.
        """
        names = {"student": student, "teacher": teacher}
        kind = f"xtoken.{type(self).__name__}"
        text = section(self.FILE_NAME, kind, self.TITLE, names, self.facts(), self.metadata)
        return push(self.save, self.FILE_NAME, text, repo_id, private=private, token=token, revision=revision)


def fetch(source: str | os.PathLike[str], file_name: str, revision: str | None, token: str | bool | None) -> Path:
    """A file of a folder, or of a repository of the Hub by its name.

    FileNotFoundError for a folder that is not there or has no such file.
    """
    if Path(source).is_dir():
        if not (Path(source) / file_name).is_file():
            raise FileNotFoundError(f"source: no {file_name} in {source}")
        return Path(source) / file_name
    check_source(source, "source")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(str(source), file_name, revision=revision, token=token))


def section(
    file_name: str,
    kind: str,
    title: str,
    names: Mapping[str, str | None],
    facts: Iterable[str],
    metadata: Mapping[str, str],
) -> str:
    """What a card says of a file.

    `kind` is the class that reads it, `names` those of the tokenizers by side, where they are known, `facts` what is in
    it, line by line, and `metadata` the file's own, for the fingerprints.
    """
    sides = []
    for side, name in names.items():
        if name is not None and (not name.isprintable() or "`" in name or not name.strip()):
            raise ValueError(f"{side}: expected a name of a tokenizer in one line, got {name!r}")
        known = f"`{name}`, " if name is not None else ""
        sides.append(f"* {side}: {known}fingerprint `{metadata.get(f'{side}_fingerprint', 'unknown')}`")
    return "\n".join([
        f"## `{file_name}`: {title}",
        "",
        *sides,
        *(f"* {fact}" for fact in facts),
        "",
        "```python",
        f'{kind}.from_pretrained("REPOSITORY", student_tok, teacher_tok)',
        "```",
        "",
        "Loading checks the format and its version, the checksum of the content, and that both tokenizers are those of",
        "the file, by fingerprints of all that they do; it raises a ValueError otherwise.",
    ])  # fmt: skip


def with_section(card: str | None, file_name: str, text: str) -> str:
    """A card with a file's section new or in place of the old one; all else stays."""
    begin, end = f"<!-- xtoken: {file_name} -->", f"<!-- xtoken: end of {file_name} -->"
    part = f"{begin}\n{text}\n{end}"
    if card is None:
        return f"{HEADER}\n{part}\n"
    old = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if old.search(card):
        return old.sub(lambda _: part, card, count=1)
    return f"{card.rstrip()}\n\n{part}\n"


def push(
    save: Callable[[Path], None], file_name: str, text: str, repo_id: str, *, private: bool | None,
    token: str | bool | None, revision: str | None,
) -> str:  # fmt: skip
    """Commits what `save` writes, with its section of the card; the repository is made if need be. The commit's URL."""
    from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file_name
        save(path)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        try:
            card: str | None = Path(hf_hub_download(repo_id, CARD, revision=revision, token=token)).read_text("utf-8")
        except EntryNotFoundError:
            card = None
        new = with_section(card, file_name, text.replace('"REPOSITORY"', f'"{repo_id}"'))
        operations: list[Any] = [
            CommitOperationAdd(file_name, str(path)), CommitOperationAdd(CARD, new.encode())
        ]  # fmt: skip
        info = api.create_commit(repo_id, operations, commit_message=f"{file_name} by xtoken", revision=revision)
    return str(info.commit_url)
