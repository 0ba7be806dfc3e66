"""The index of the output, ``manifest.json``: what it was made from, its shards, and what may be resumed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..remote import Place, sizes
from ..storage import Index
from .files import InputFile
from .partition import FileSlice, Shard

INDEX = Index("manifest.json", "2", "an index of aligned shards", "xtoken align with another --output")


@dataclass
class Counts:
    """What is in a shard, or in many."""

    documents: int = 0
    text_bytes: int = 0
    student_tokens: int = 0
    teacher_tokens: int = 0
    chunks: int = 0
    not_optimal: int = 0
    """Documents on which the dynamic program ran out of budget (`Alignment.optimal`)."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Broken documents by file."""

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Counts:
        """Counts out of JSON; TypeError or KeyError if they are none."""
        found = {one.name: entry[one.name] for one in fields(cls)}
        skipped = found.pop("skipped")
        for number in (*found.values(), *skipped.values()):
            if type(number) is not int or not 0 <= number < 1 << 62:
                raise TypeError(f"expected a count, got {number!r}")
        return cls(**found, skipped=dict(skipped))

    def add(self, other: Counts) -> None:
        """Adds the counts of another shard."""
        for name, number in vars(other).items():
            if name != "skipped":
                setattr(self, name, getattr(self, name) + number)
        self.skipped = dict(Counter(self.skipped) + Counter(other.skipped))


@dataclass
class Manifest:
    """The index of an output folder.

    Written twice: before the first shard is made, with the partition and no counts, and when all are complete. In
    between, the shards themselves say what is complete, so that the index of a large corpus need not be written again
    for each of them.
    """

    parameters: dict[str, Any]
    """What the output depends on, besides the inputs: tokenizers, method, max_length and so on."""
    inputs: list[InputFile]
    shards: list[Shard]
    counts: list[Counts] = field(default_factory=list)
    """One for each shard once the output is complete."""
    deaths: int = 0
    """Workers that died in this run, whose shards were made again; the file does not say."""

    @property
    def is_complete(self) -> bool:
        """Whether all shards were made."""
        return len(self.counts) == len(self.shards)

    @property
    def total(self) -> Counts:
        """The counts of all shards together."""
        total = Counts()
        for counts in self.counts:
            total.add(counts)
        return total

    def changes(self, other: Manifest) -> list[str]:
        """What differs in the parameters and inputs of another run, in words."""
        found = [
            f"{name}: was {self.parameters.get(name)!r}, now {value!r}"
            for name, value in other.parameters.items()
            if self.parameters.get(name) != value
        ]
        before, now = ({file.path: file for file in one.inputs} for one in (self, other))
        found += [f"input {path} is gone" for path in before if path not in now]
        found += [f"input {path} is new" for path in now if path not in before]
        found += [f"input {path} was changed" for path in now if path in before and before[path] != now[path]]
        if not found and list(before) != list(now):
            found.append("the inputs came in another order")
        return found

    def save(self, folder: Place) -> None:
        """Writes the index; it is replaced as a whole or not at all."""
        place = {file: k for k, file in enumerate(self.inputs)}
        shards: list[dict[str, Any]] = []
        for shard in self.shards:
            pieces = [[place[p.file], p.start, p.stop, p.number, p.size] for p in shard.slices]
            shards.append({"file": shard.file_name, "pieces": pieces})
        held = sizes(folder) if self.counts else {}
        for entry, counts in zip(shards, self.counts, strict=False):  # no counts at first
            entry |= {**asdict(counts), "bytes": held[entry["file"]]}
        content = {"complete": self.is_complete, "parameters": self.parameters, "total": asdict(self.total)}
        INDEX.write(folder, {**content, "inputs": [asdict(file) for file in self.inputs], "shards": shards})

    @staticmethod
    def load(folder: Place) -> Manifest:
        """Reads the index of a folder; FileNotFoundError if there is none, ValueError if it is of another format."""
        with INDEX.read(folder) as content:
            inputs = [InputFile(**file) for file in content["inputs"]]
            shards = []
            for k, entry in enumerate(content["shards"]):
                shards.append(Shard(k, tuple(FileSlice(inputs[place], *rest) for place, *rest in entry["pieces"])))
            made = content["shards"] if content["complete"] else []
            counts = [Counts.of(entry) for entry in made]
            return Manifest(dict(content["parameters"]), inputs, shards, counts)
