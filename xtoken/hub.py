"""W and piece indices on the Hub: a file and its section of the repository's card, in one commit."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from . import _core
from .storage import TensorFile, check_fingerprints
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
    ARGUMENT: ClassVar[str]
    """What functions that take it call it."""
    FILE: ClassVar[TensorFile]

    metadata: dict[str, str]

    def facts(self) -> list[str]:
        """What the card says of it beside the tokenizers."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file."""
        raise NotImplementedError

    @classmethod
    def _of_file(cls: type[Kept], tensors: dict[str, Tensor], metadata: dict[str, str]) -> Kept:
        """What `save` has written; ValueError if it is damaged."""
        raise NotImplementedError

    @classmethod
    def load(
        cls: type[Kept], path: str | os.PathLike[str], student_tok: TokenizerLike = None,
        teacher_tok: TokenizerLike = None,
    ) -> Kept:  # fmt: skip
        """Reads a file written by `save`, and checks that it was built for the tokenizers that are given.

        Raises FileNotFoundError if there is no such file; ValueError if it holds something else, is truncated or
        damaged, has another version, or was built for other tokenizers.
        """
        made = cls.FILE.load(path, cls._of_file)
        check_fingerprints(f"{path}: {cls.ARGUMENT}", made, made.metadata, student_tok, teacher_tok)
        return made

    def check_tokenizers(self, student_tok: TokenizerLike = None, teacher_tok: TokenizerLike = None) -> None:
        """Raises ValueError if it was built for other tokenizers than these (those that are given)."""
        check_fingerprints(self.ARGUMENT, self, self.metadata, student_tok, teacher_tok)

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
        path = Path(source) / cls.FILE_NAME
        if not Path(source).is_dir():
            check_source(source, "source")
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(str(source), cls.FILE_NAME, revision=revision, token=token))
        elif not path.is_file():
            raise FileNotFoundError(f"source: no {cls.FILE_NAME} in {source}")
        return cls.load(path, student_tok, teacher_tok)

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
        text = self._section({"student": student, "teacher": teacher})
        from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api = HfApi(token=token)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            try:
                card = hf_hub_download(repo_id, CARD, revision=revision, token=token)
                known: str | None = Path(card).read_text("utf-8")
            except EntryNotFoundError:
                known = None
            new = with_section(known, self.FILE_NAME, text.replace('"REPOSITORY"', f'"{repo_id}"'))
            operations: list[Any] = [
                CommitOperationAdd(self.FILE_NAME, str(Path(folder) / self.FILE_NAME)),
                CommitOperationAdd(CARD, new.encode()),
            ]
            message = f"{self.FILE_NAME} by xtoken"
            info = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
        return str(info.commit_url)

    def _section(self, names: Mapping[str, str | None]) -> str:
        """What a card says of the file; `names` are those of the tokenizers by side, where they are known."""
        sides = []
        for side, name in names.items():
            if name is not None and (not name.isprintable() or "`" in name or not name.strip()):
                raise ValueError(f"{side}: expected a name of a tokenizer in one line, got {name!r}")
            known = f"`{name}`, " if name is not None else ""
            sides.append(f"* {side}: {known}fingerprint `{self.metadata.get(f'{side}_fingerprint', 'unknown')}`")
        return "\n".join([
            f"## `{self.FILE_NAME}`: {self.TITLE}",
            "",
            *sides,
            *(f"* {fact}" for fact in self.facts()),
            "",
            "```python",
            f'xtoken.{type(self).__name__}.from_pretrained("REPOSITORY", student_tok, teacher_tok)',
            "```",
            "",
            "Loading checks the format and its version, the checksum of the content, and that both tokenizers are "
            "those of",
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
