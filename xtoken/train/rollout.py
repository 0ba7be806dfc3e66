"""On policy: completions that the student, or a teacher, writes in training take the place of those of the data."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers.integrations import is_deepspeed_zero3_enabled

from xtoken.losses.backends import IGNORED
from xtoken.once import Once
from xtoken.report.run import add_sample
from xtoken.served import ServedModel
from xtoken.terminal import printable

from .completion import Completion, Prompt, of_sampled, of_text, read_prompt, text_of
from .encode import ExampleEncoder
from .generate import KEY, ModelWriter, Sampling, ServerWriter, Weights, end_ids
from .itself import StudentTeacher
from .limits import head_rows
from .reader import Reader
from .routing import is_routed

logger = logging.getLogger(__name__)

MOST_WITHOUT = 1000
"""Rows at the beginning that may all be without a prompt."""

MOST_REQUESTS = 64
"""Requests to a server of the student in flight, of each process."""

SHOWN = 400
"""Characters of a prompt, and of its completion, that are shown."""


@dataclass
class _Counts:
    """Of one process, since the last summary."""

    rows: int = 0
    replaced: int = 0
    skipped: int = 0
    completions: int = 0
    tokens: int = 0
    ended: int = 0
    unmatched: int = 0
    cut: int = 0


class Rollout:
    """Replaces examples of a step by completions of their prompts, as the seed, the step and the process decide.

    Parameters
    ----------
    trainer : XTokenTrainer
        Its ``args`` say for which share of the prompts, and how completions are drawn.
    encoder : ExampleEncoder
        How its data were read.

    Attributes
    ----------
    collate : callable
        Makes the trainer's batches of examples, which they must bring along.

    No teacher is cached. Raises ValueError if the student writes, but nothing is distilled; if a completion would take
    all tokens of an example; if the model that is to write cannot, or is sharded by FSDP1; if no example has a prompt,
    or none that leaves room for a completion.
    """

    def __init__(self, trainer: Any, encoder: ExampleEncoder) -> None:
        self.trainer, self.args = trainer, trainer.args
        self.collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
        self.encoder = encoder
        self.by_teacher = self.args.on_policy == "teacher"
        self.sampling = Sampling(self.args.max_new_tokens, self.args.generation_temperature, self.args.generation_top_p)
        self.share = 1.0 if self.by_teacher else float(self.args.on_policy)
        if not self.by_teacher and not (self.args.kd_weight and any(one.weight for one in trainer.criterion.teachers)):
            raise ValueError(
                "on_policy: expected a kd_weight and a teacher's weight other than 0, since what the student writes is "
                "trained on by the distillation alone"
            )
        self.weights: Weights | None = None
        self.writer: ModelWriter | ServerWriter
        self.reader, self.writer, longest = self._of_teacher() if self.by_teacher else self._of_student()
        read = encoder.limits[encoder.sides.index(self.reader)]
        known = [limit - self.args.max_new_tokens for limit in (read, longest) if limit is not None]
        self.longest = min(known, default=None)
        """Tokens of the longest prompt."""
        if self.longest is not None and self.longest < 1:
            raise ValueError(
                f"max_new_tokens: expected fewer than the {self.longest + self.args.max_new_tokens} tokens of an "
                f"example, got {self.args.max_new_tokens}"
            )
        self._counts, self._warn_once = _Counts(), Once(logger.warning)
        self._seen = self._prompts = self._read = self._fitting = 0
        self._check_prompts(trainer.train_dataset)

    def _of_student(self) -> tuple[Reader, ModelWriter | ServerWriter, int | None]:
        trainer, reader = self.trainer, self.encoder.student
        if self.args.generation_url is not None:
            served = ServedModel(
                self.args.generation_url, trainer.processing_class, logprobs=1, requests=MOST_REQUESTS,
                key=os.environ.get(KEY),
            )  # fmt: skip
            writer = ServerWriter(served, self.sampling, end_ids(reader, trainer.model), head_rows(trainer.model))
            folder = Path(self.args.output_dir) / "generation"
            self.weights = Weights(trainer, writer, folder, self.args.sync_every)
            known = [one for one in (served.positions, trainer._limits.positions) if one is not None]
            return reader, writer, min(known, default=None)
        if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
            raise ValueError("on_policy: expected FSDP2, under which a sharded student can generate, got FSDP1")
        is_sharded = trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        own = self._writer(
            lambda: trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=False),
            reader, trainer._limits, self.args.device, self._most if is_sharded else None,
        )  # fmt: skip
        return reader, own, trainer._limits.positions

    def _of_teacher(self) -> tuple[Reader, ModelWriter | ServerWriter, int | None]:
        for teacher, side in zip(self.trainer.teachers, self.encoder.teachers, strict=True):
            reader, model, limits = side or self.encoder.student, teacher.model, teacher.limits
            if isinstance(teacher, StudentTeacher):
                continue
            if teacher.served is not None:
                return reader, ServerWriter(teacher.served, self.sampling, end_ids(reader)), limits.positions
            if hasattr(model, "generate"):
                writer = self._writer(lambda model=model: model, reader, limits, teacher.device or model.device)
                return reader, writer, limits.positions
        raise ValueError("on_policy: expected a teacher whose model can generate for 'teacher', got none")

    def _writer(self, model: Any, reader: Reader, limits: Any, device: torch.device, most: Any = None) -> ModelWriter:
        size = self.args.per_device_train_batch_size * self.args.num_generations
        return ModelWriter(model, reader, limits, device, self.sampling, size, most)

    def _most(self, number: int) -> int:
        """The largest over the processes."""
        return int(self.trainer.accelerator.gather(torch.tensor([number], device=self.args.device)).max())

    def _check_prompts(self, data: Any) -> None:
        """Raises ValueError if a small data set has no prompt, or none that leaves room; of others the first rows are
        counted in training."""
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__") or len(data) > MOST_WITHOUT:
            return
        found = 0
        for example in (data[k] for k in range(len(data))):
            if self._why_not(example) is None:
                found += 1
                if self._fits(read_prompt(example["prompt"], self.reader)):
                    return
        if not found:
            raise ValueError(_without_prompts(f"none of the {len(data)} examples"))
        raise ValueError(self._without_room(f"none of the {found} prompts"))

    def _why_not(self, example: Mapping[str, Any]) -> str | None:
        """Why an example is none to complete; None if it is."""
        if "prompt" not in example:
            return "has no prompt"
        is_used = self.by_teacher or any(is_routed(example, m) for m in range(len(self.trainer.teachers)))
        return None if is_used else "goes to no teacher, which alone would teach something of a completion"

    def _fits(self, prompt: Prompt) -> bool:
        return bool(prompt.ids) and (self.longest is None or len(prompt.ids) <= self.longest)

    def _without_room(self, which: str) -> str:
        return (
            f"max_new_tokens: expected prompts of at most {self.longest} tokens, which leave room for "
            f"{self.args.max_new_tokens} of a completion, got {which} with so few"
        )

    def replace(self, batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The batches of a step, some of their examples replaced; every process must make the call."""
        step, process = self.trainer.state.global_step, self.args.process_index
        seeds = np.random.SeedSequence([self.args.seed, step, process])
        draws = np.random.default_rng(seeds)
        groups: list[Any] = [getattr(batch.get("host"), "examples", None) for batch in batches]
        if None in groups:
            raise ValueError("on_policy: expected batches of the Trainer's own DataLoader, which keep their examples")
        chosen: list[tuple[int, int, Prompt]] = []
        for b, examples in enumerate(groups):
            for k, (example, draw) in enumerate(zip(examples, draws.random(len(examples)), strict=True)):
                prompt = self._prompt(example, draw)
                if prompt is not None:
                    chosen.append((b, k, prompt))
        if self.weights is not None:
            self.weights.send(step)
        repeated = [one for one in chosen for _ in range(self.args.num_generations)]
        written = self.writer.write([prompt.ids for *_, prompt in repeated], int(seeds.generate_state(1)[0]))
        completions = [
            Completion(prompt, ids, bool(ids) and ids[-1] in self.writer.ends, groups[b][k].get("route"))
            for (b, k, prompt), ids in zip(repeated, written, strict=True)
        ]
        made = self._made(completions)
        new: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for (b, k, _), one in zip(repeated, made, strict=True):
            if one is not None:
                new.setdefault((b, k), []).append(one)
        self._counts.replaced += len(new)
        self._counts.completions += len(completions)
        self._counts.tokens += sum(len(one.ids) for one in completions)
        self._counts.ended += sum(one.ended for one in completions)
        if completions and self.trainer.is_world_process_zero() and self.trainer._is_logged(step + 1):
            self._show(completions[0], step + 1)
        return [
            self.collate([known for k, example in enumerate(examples) for known in new.get((b, k), [example])])
            if any((b, k) in new for k in range(len(examples)))
            else batch
            for b, (batch, examples) in enumerate(zip(batches, groups, strict=True))
        ]

    def _prompt(self, example: Mapping[str, Any], draw: float) -> Prompt | None:
        """The prompt of an example that is to be replaced; one that is nothing but a prompt always is."""
        self._seen += 1
        self._counts.rows += 1
        is_trained = bool((np.asarray(example["labels"]) != IGNORED).any())
        left = "is trained on as it is" if is_trained else "is left out (nothing of it is trained on)"
        if (why := self._why_not(example)) is not None:
            if not self._prompts and self._seen == MOST_WITHOUT:
                raise ValueError(_without_prompts(f"none of the first {self._seen} rows"))
            self._tell(f"{why}, {left}", f"a row {why}, so that it {left}; likewise others like it")
            return None
        self._prompts += 1
        if draw >= self.share and is_trained:
            return None
        prompt = read_prompt(example["prompt"], self.reader)
        self._read += 1
        if self._fits(prompt):
            self._fitting += 1
            return prompt
        if not self._fitting and self._read == MOST_WITHOUT:
            raise ValueError(self._without_room(f"none of the first {self._read} prompts"))
        self._counts.skipped += 1
        self._tell(
            f"too long, {left}",
            f"a prompt of {len(prompt.ids)} tokens leaves no room for {self.args.max_new_tokens} of a completion, so "
            f"its row {left}; on_policy_skipped is the share of such rows",
        )
        return None

    def _made(self, completions: Sequence[Completion]) -> list[dict[str, Any] | None]:
        if not self.by_teacher:
            made: list[Any] = of_sampled(self.encoder, completions) if completions else []
            self._counts.cut += sum(any(entry["is_cut"] for entry in one["teachers"]) for one in made)
            for one in made:
                for m, (teacher, entry) in enumerate(zip(self.trainer.teachers, one["teachers"], strict=True)):
                    if entry["ids"] is not None and not len(entry["spans"]) and is_routed(one, m):
                        self._counts.unmatched += 1
                        self._tell(
                            f"unmatched {teacher.name}",
                            f"a completion has no chunk for {teacher.name}, so it teaches nothing; on_policy_unmatched "
                            "is the share of such completions",
                        )
                    if entry["is_cut"]:
                        self._tell(
                            f"cut {teacher.name}",
                            f"a completion is cut for {teacher.name}, whose limit is {len(entry['ids'])} tokens, and "
                            "teaches nothing behind that; on_policy_cut is the share of such completions",
                        )
            return made
        made = [of_text(self.encoder, one, self.reader) for one in completions]
        if lost := sum(one is None for one in made):
            self._counts.skipped += lost
            self._tell(
                "nothing", "nothing of a completion is trained on, so its row is left as it is (on_policy_skipped)"
            )
        return made

    def _tell(self, kind: str, message: str) -> None:
        """Says something of a kind once."""
        self._warn_once(kind, "on_policy: %s", printable(message))

    def _show(self, completion: Completion, step: int) -> None:
        prompt = b"".join(self.reader.tokens[i] for i in completion.prompt.ids).decode("utf-8", "replace")
        text = text_of(completion, self.reader)
        end = "ended" if completion.ended else "cut"
        tqdm.write(
            f"step {step}, a prompt: {'... ' * (len(prompt) > SHOWN)}{printable(prompt[-SHOWN:])}\n"
            f"step {step}, its completion, {len(completion.ids)} tokens, {end}: "
            f"{printable(text[:SHOWN])}{' ...' * (len(text) > SHOWN)}"
        )
        add_sample(
            self.args.output_dir, step=step, prompt=prompt, completion=text, tokens=len(completion.ids),
            ended=completion.ended,
        )  # fmt: skip

    def summary(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Since the last one, of all processes: ``on_policy``, the share of rows that were replaced, and
        ``on_policy_skipped``, that could not be; ``completion_length`` in tokens; ``completion_ended``, the share that
        came to an end; and if there are any, ``on_policy_unmatched``, the share without a chunk for a teacher, and
        ``on_policy_cut``, the share that a teacher's limit has cut.
        """
        total = add_up(torch.tensor(astuple(self._counts), dtype=torch.float64, device="cpu"))
        self._counts = _Counts()
        counts = _Counts(*total.tolist())
        found = {
            "on_policy": counts.replaced / max(counts.rows, 1),
            "on_policy_skipped": counts.skipped / max(counts.rows, 1),
        }
        if counts.completions:
            found["completion_length"] = counts.tokens / counts.completions
            found["completion_ended"] = counts.ended / counts.completions
        if counts.unmatched:
            found["on_policy_unmatched"] = counts.unmatched / counts.completions
        if counts.cut:
            found["on_policy_cut"] = counts.cut / counts.completions
        return found


def _without_prompts(which: str) -> str:
    return (
        f"on_policy: expected rows with a prompt (messages, or prompt), got {which} with one, and with a teacher to go "
        "to; examples have them of ExampleEncoder(..., with_prompts=True)"
    )
