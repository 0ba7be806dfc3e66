"""Teachers: loading models, running them without a gradient, and guarding against mixed-up vocabularies."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xtoken.alignment import Alignment
from xtoken.audit import same_tokens
from xtoken.check import found_device
from xtoken.losses import Needs, Teacher, registered
from xtoken.losses.logits import AnyLogits, OrderedLogits
from xtoken.projection import ProjectionMatrix
from xtoken.served import ServedModel
from xtoken.storage import check_fingerprints
from xtoken.vocabulary import TokenizerLike, Vocabulary, sources
from xtoken.vocabulary.roles import RESERVED, ROLES

from . import adapters
from .chat import use_template
from .fused import Fused
from .limits import Limits, check_head
from .packing import PACKED, is_packed, packing_fault
from .prepare import build_objective, check_losses
from .quantized import check_layers, stays
from .quantized import quantization_config as quantization
from .routing import read_by
from .serving import Asked

EFFICIENT_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"

SAME_BYTES_SHARE = 0.5
"""Of the first batch's chunks at least this share must spell the same bytes on both sides."""


def load_model(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    may_shard: bool = False,
    quantization_config: Any = None,
) -> tuple[Any, Any]:
    """A causal language model and its tokenizer.

    The tokenizer has a pad token: if it brings none, its end token or another special one; see `ensure_pad_token`.

    Parameters
    ----------
    source : path or str
        A folder, a Hub id, or a GGUF file (``.gguf``), which is unpacked to `dtype`. Of a folder with an adapter (peft)
        the model that it was made for, with the adapter merged into its weights.
    dtype : torch.dtype or str
        Of the weights, such as "bfloat16"; "auto" is the type they are stored in (float32 for GGUF).
    device : torch.device, optional
        Where to put the model; "auto" spreads it over all accelerators, if there are any. Default: left on the CPU.
    trust_remote_code, revision
        As for ``from_pretrained``.
    may_shard : bool
        Whether a process may get only its share of the weights where FSDP (``cpu_ram_efficient_loading``) or DeepSpeed
        (ZeRO-3) are switched on. That is for the model that they train; a teacher is needed whole.
    quantization_config : str, mapping or object, optional
        To load weights in 8 or 4 bits: a name such as "int8" or "nf4", or what transformers takes; see
        `xtoken.train.quantized.quantization_config`. Such a model is put where it belongs at once.

    Raises
    ------
    ValueError
        If the output layer is narrower than the tokenizer, see `check_head`; for a GGUF file or an adapter that is to
        be quantised; for a device that is not there.
    FileNotFoundError
        If a GGUF file does not exist.
    OSError
        If there is no such model, naming it.
    ImportError
        If the package that an adapter or quantised weights need is not installed.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    if device is not None and str(device) != "auto":
        found_device(device)
    quantized = quantization(quantization_config, dtype)
    is_adapter = adapters.is_adapter(source)
    place = adapters.base_source(source) if is_adapter else source
    has_own = not is_adapter or (Path(source) / "tokenizer_config.json").is_file()
    name, options = _place(place, trust_remote_code, None if is_adapter else revision)
    tokenizer = load_tokenizer(source if has_own else place, trust_remote_code=trust_remote_code, revision=revision)
    is_gguf, is_spread = "gguf_file" in options, str(device) == "auto"
    if is_spread:
        options["device_map"] = "auto"
    if quantized is not None:
        if is_gguf or is_adapter:
            kind = "a GGUF file, which is unpacked" if is_gguf else "an adapter, which is merged into its model"
            raise ValueError(f"quantization_config: expected None for {kind}, got one for {source}; save that first")
        options["quantization_config"] = quantized
        if device is not None and not is_spread:
            options["device_map"] = {"": str(device)}
    wanted = torch.float32 if is_gguf and dtype == "auto" else dtype
    if is_gguf and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with nullcontext() if may_shard else _whole():
        model = AutoModelForCausalLM.from_pretrained(name, dtype=wanted, **options)
    if is_gguf and getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)  # its weights are unpacked; it can be trained and saved
    if is_adapter:
        model = adapters.merged(model, source)
        adapters.load_generation(model, Path(source))
    is_placed = is_spread or getattr(model, "hf_device_map", None) is not None or stays(model)
    if device is not None and not is_placed:
        model = model.to(device)
    if quantized is not None:
        check_layers(model, str(source))
    check_head(model, Vocabulary.from_tokenizer(tokenizer), str(source))
    return model, tokenizer


@contextmanager
def _whole() -> Iterator[None]:
    """Keeps transformers from loading a sharded model, which it decides by an environment variable and a global."""
    from transformers.integrations import deepspeed

    efficient = os.environ.pop(EFFICIENT_LOADING, None)
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference
        if efficient is not None:
            os.environ[EFFICIENT_LOADING] = efficient


def load_tokenizer(
    source: str | os.PathLike[str], *, trust_remote_code: bool = False, revision: str | None = None
) -> Any:
    """The tokenizer of `load_model`, without the model; also from a file, as for `Vocabulary.from_tokenizer`."""
    tokenizer = sources.load_tokenizer(source, to_train=True, trust_remote_code=trust_remote_code, revision=revision)
    ensure_pad_token(tokenizer)
    return tokenizer


def _place(source: str | os.PathLike[str], trust_remote_code: bool, revision: str | None) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` takes for a folder, a Hub id or a GGUF file."""
    if not str(source).endswith(".gguf"):
        return str(source), {"trust_remote_code": trust_remote_code, "revision": revision}
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"source: no such file: {path}")
    return str(path.parent), {"gguf_file": path.name}


def ensure_pad_token(tokenizer: Any) -> None:
    """Gives a tokenizer without a pad token one to fill rows with that stands for no text: its end token, or one that
    is called so, or any special token, those that no text holds first; else a new one, which is masked like all."""
    if tokenizer.pad_token is not None:
        return
    special = {i: str(one) for i, one in tokenizer.added_tokens_decoder.items() if one.special}
    end = tokenizer.eos_token
    ranked = [end, *ROLES["pad"], *filter(RESERVED.search, special.values()), *special.values()]
    found = next((one for one in ranked if one in special.values()), None)
    if found is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    else:
        tokenizer.pad_token = found


def check_teacher(given: Any, name: str) -> None:
    """Raises TypeError for what is no teacher, by name or otherwise."""
    if not isinstance(given, (str, os.PathLike, nn.Module, ServedModel, TeacherModel)):
        raise TypeError(f"{name}: expected one, as a name, model or TeacherModel, got {type(given).__name__}")


class TeacherModel:
    """A frozen model that a student learns from, and how.

    Parameters
    ----------
    objective : xtoken.Teacher
        Loss, weight and W.
    model : nn.Module, ServedModel, optional
        Called with ``input_ids``, ``attention_mask`` and, for packed rows, ``position_ids``; its result has
        ``logits``. It is switched to evaluation and frozen. Or what `load_model` takes, with its tokenizer. Or a
        server, with its tokenizer. None: its logits come with the batches, from a cache.
    tokenizer : optional
        As for `Vocabulary.from_tokenizer`; lets ids be checked against the vocabulary, and rows be encoded.
    name : str
        For messages and metrics.
    device : torch.device, optional
        Where the model computes. Default: with the student, unless the model is spread by a device map.
    system : str, optional
        A text that this teacher alone is told, where `XTokenTrainer` encodes rows; see `ExampleEncoder`.

    Raises ValueError if the model's output layer lacks tokens of text, see `check_head`; for a server that is asked for
    fewer log-probabilities than ``objective.trust_top_k``.
    """

    def __init__(
        self,
        objective: Teacher,
        model: nn.Module | ServedModel | str | os.PathLike[str] | None = None,
        tokenizer: Any = None,
        name: str = "teacher",
        device: torch.device | str | None = None,
        system: str | None = None,
    ) -> None:
        if isinstance(model, (str, os.PathLike)):
            model, loaded = load_model(model)
            tokenizer = loaded if tokenizer is None else tokenizer
        self.served = model if isinstance(model, ServedModel) else None
        if self.served is not None:
            tokenizer = self.served.tokenizer if tokenizer is None else tokenizer
        self.objective = objective
        self.model: Any = None if self.served is not None else model
        self.read_as(tokenizer)
        self.name = name
        self.system = system
        self.device = None if device is None else torch.device(device)
        self.reasons: tuple[str, ...] = ()
        """Why it has its loss, in words, if `build` has chosen."""
        self.built_by: Any = None
        """The XTokenConfig whose options of teachers it has, if `build_teachers` has made it."""
        self.may_read_student_ids = False
        """Whether its tokenizer is known to be the student's."""
        self.limits = Limits()
        self._packing_is_known = False
        if self.served is not None:
            self.limits = Limits(positions=self.served.positions)
            # A row has the realised token besides the likeliest ones, and does not say what its rank beyond these is.
            trusted, known = objective.trust_top_k, self.served.logprobs
            if trusted is not None and known < min(trusted, len(self.served.vocabulary)):
                raise ValueError(
                    f"{name}: trust_top_k: expected at most {known}, the log-probabilities that its server is asked "
                    f"for, got {trusted}"
                )
        elif self.model is not None:
            self.limits = Limits.of(self.model, self.vocabulary, name)
            self._freeze()

    @classmethod
    def of_student(
        cls,
        objective: Teacher | None = None,
        *,
        average: float | None = None,
        name: str = "self",
        system: str | None = None,
    ) -> TeacherModel:
        """The student that an `XTokenTrainer` gets as a teacher of its own, of use with a `system` message above all.

        A copy of the student as it is when the trainer is made, which stays; with adapters of PEFT the model that they
        were put on, which takes no memory. Or with `average` the moving average of its weights, which after each step
        becomes ``average * itself + (1 - average) * student``, and is saved in checkpoints. Not with FSDP or DeepSpeed.

        Parameters
        ----------
        objective : xtoken.Teacher, optional
            Default: the default loss of a shared tokenizer.
        average : float in [0, 1), optional
        name, system
            As for `TeacherModel`.

        Raises ValueError if `average` is out of range.
        """
        from .itself import StudentTeacher

        return StudentTeacher(Teacher() if objective is None else objective, average, name, system)

    @classmethod
    def build(
        cls,
        source: str | os.PathLike[str] | nn.Module | ServedModel,
        student_tok: TokenizerLike,
        *,
        model: Any = "load",
        tokenizer: Any = None,
        name: str | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        trust_remote_code: bool = False,
        quantization_config: Any = None,
        chat_template: str | None = None,
        is_one_of_several: bool = False,
        **how: Any,
    ) -> TeacherModel:
        """A teacher by its name alone: model, tokenizer, and the loss with what it needs.

        Parameters
        ----------
        source : path, str, nn.Module or ServedModel
            As for `load_model`; or a model that is there already, or behind a server.
        student_tok : tokenizer
            As for `Vocabulary.from_tokenizer`.
        model : optional
            What to call: "load" loads the model of `source`; None: nothing, since logits come with the batches, from a
            cache; a `ServedModel`; or something else that is called like a model.
        tokenizer : optional
            Default: that of a served model, that of `source`, or the one that the model says it was loaded with.
        name : str, optional
            Default: the last part of `source`.
        dtype, device, trust_remote_code, quantization_config
            As for `load_model`.
        chat_template : str, optional
            For a tokenizer that has none; see `use_template`.
        is_one_of_several : bool
            Whether options that its loss does not have are those of other teachers' losses; see `check_losses`.
        **how
            As for `build_objective`: ``loss``, ``weight``, ``loss_options``, ``gamma``, ``learn_projection``,
            ``texts``, ``cache``, ``trust_top_k``.

        Raises ValueError for a model that does not say which tokenizer it has or that is not loaded here, if it is to
        be quantised, and for options that the loss does not have; and what `load_model` raises.

        Examples
        --------
        ::

            teacher = TeacherModel.build("Qwen/Qwen3-4B", student_tok, loss="auto", weight=0.5)
        """
        check_teacher(source, "source")
        if isinstance(source, ServedModel):
            model, source = source, source.model
        elif isinstance(source, nn.Module):
            model, source = source, str(getattr(getattr(source, "config", None), "_name_or_path", ""))
            if tokenizer is None and not source:
                raise ValueError(
                    f"tokenizer: expected one, since {type(model).__name__} does not say where it was loaded from"
                )
        if quantization_config not in (None, "none") and not isinstance(model, str):
            raise ValueError(
                f"quantization_config: expected none for {source or 'a model'}, which is not loaded here, got "
                f"{quantization_config!r}"
            )
        if isinstance(model, str):
            model, loaded = load_model(
                source, dtype=dtype, device=device, trust_remote_code=trust_remote_code,
                quantization_config=quantization_config,
            )  # fmt: skip
            tokenizer = loaded if tokenizer is None else tokenizer
        elif tokenizer is None and isinstance(model, ServedModel):
            tokenizer = model.tokenizer
        elif tokenizer is None:
            tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
        use_template(tokenizer, chat_template)
        objective, reasons = build_objective(
            Vocabulary.from_tokenizer(student_tok), Vocabulary.from_tokenizer(tokenizer), **how
        )
        if not is_one_of_several:
            check_losses([objective.loss], how.get("loss_options"), how.get("learn_projection", False))
        name = name or (os.path.basename(os.path.abspath(source)).removesuffix(".gguf") if source else "teacher")
        made = cls(objective, model, tokenizer, name, None if device == "auto" else device)
        made.reasons = reasons
        return made

    def read_as(self, tokenizer: Any) -> None:
        """Gives it a tokenizer, as the student as its own teacher gets the student's."""
        self.tokenizer = tokenizer
        self.vocabulary = None if tokenizer is None else Vocabulary.from_tokenizer(tokenizer)

    def summary(self) -> str:
        """Its loss and weight, and the reasons below."""
        line = f"teacher {self.name}: {self.objective.loss}, weight {self.objective.weight:g}"
        return "\n".join([line, *(f"  {reason}" for reason in self.reasons)])

    def _freeze(self) -> None:
        self.model.eval().requires_grad_(False)

    @property
    def reads_student_ids(self) -> bool:
        """Whether its loss compares both models position by position, on the student's own ids."""
        return registered()[self.objective.loss].needs is Needs.SAME_TOKENIZER

    def check_student(self, student: Vocabulary) -> None:
        """Raises ValueError if the objective does not go with the student's tokenizer."""
        if self.vocabulary is None:
            return
        self.may_read_student_ids = same_tokens(student, self.vocabulary)
        if self.reads_student_ids and not self.may_read_student_ids:
            raise ValueError(
                f"{self.name}: loss={self.objective.loss!r} feeds it the student's ids, but its tokenizer numbers "
                f"tokens differently ({len(self.vocabulary)} and {len(student)} tokens); use what xtoken.choose_loss "
                "recommends"
            )
        W = self.objective.projection
        if W is not None and tuple(W.shape) != (len(student), len(self.vocabulary)):
            raise ValueError(
                f"{self.name}: expected a projection of shape {[len(student), len(self.vocabulary)]} for the student's "
                f"and its own tokenizer, got {list(W.shape)}"
            )
        for name, made in (("projection", W), ("pieces", self.objective.pieces)):
            if made is not None:
                check_fingerprints(f"{self.name}: {name}", made, made.metadata, student, self.vocabulary)

    def objective_for(self, rows: int | None, device: torch.device) -> Teacher:
        """Its objective for a student whose output layer has `rows` rows (None: enough): with W on the device, without
        the special tokens that a model has no row for."""
        W = self.objective.projection
        if isinstance(W, ProjectionMatrix):
            W = W.within(rows, self.limits.rows)
        return self.objective if W is None else replace(self.objective, projection=W.to(device))

    def place(self, device: torch.device) -> None:
        """Moves the model to its device; by default to this one. What is loaded to its place stays there."""
        if self.model is None:
            return
        places = set((getattr(self.model, "hf_device_map", None) or {}).values())
        if len(places) == 1 or stays(self.model):
            self.device = next(self.model.parameters()).device
        if places or stays(self.model):
            return
        self.device = self.device or device
        self.model.to(self.device)

    def check_entry(self, entry: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        """Raises ValueError if a batch, on the host, would feed this teacher ids of another vocabulary, or such as it
        does not know, or longer rows than it can take."""
        ids = entry.get("input_ids")
        if entry.get("logits") is not None:
            return
        may_read = self.reads_student_ids or self.may_read_student_ids
        if ids is None and not may_read:
            raise ValueError(
                f"{self.name}: expected input_ids of its own tokenizer, got none; a teacher with another tokenizer "
                "must not read the student's ids"
            )
        if ids is inputs["input_ids"] and not may_read:
            raise ValueError(f"{self.name}: got the student's input_ids, expected those of its own tokenizer")
        side = read_by(entry, inputs)
        read = side["input_ids"]
        if self.vocabulary is not None and read.numel() and (largest := int(read.max())) >= len(self.vocabulary):
            size = len(self.vocabulary)
            raise ValueError(f"{self.name}: expected input_ids below {size}, got {largest}, of another tokenizer")
        self.limits.check(side, self.name)

    @torch.inference_mode()
    def packing_fault(self, ids: Tensor, longest: int = 0, masked: bool = False) -> str | None:
        """Why examples must not share a row of this teacher, as `packing.packing_fault` says; None if they may."""
        fault = None if self.model is None else packing_fault(self.model, ids, longest, masked)
        self._packing_is_known = fault is None
        return fault

    def ask(self, entry: dict[str, Any], inputs: Mapping[str, Any], rows: Tensor | None = None) -> None:
        """Begins to ask a server for `rows` of a batch on the host, or all; `logits` waits for ``entry["asked"]``.

        Nothing for other teachers, cached logits, and what has been asked already. Raises ValueError as `check_entry`.
        """
        if self.served is not None and entry.get("logits") is None and "asked" not in entry:
            self.check_entry(entry, inputs)
            entry["asked"] = Asked(self.served, read_by(entry, inputs), rows)

    @torch.inference_mode()
    def logits(self, entry: Mapping[str, Any], inputs: Mapping[str, Any], fused: Fused | None = None) -> AnyLogits:
        """The teacher's logits [B, T, V] for a batch, on the device of the student's `inputs`.

        `entry` is this teacher's part of the batch: ``logits`` if they are cached, ``asked`` if a server has been
        asked; else ``input_ids`` and ``attention_mask`` (and ``position_ids``); else nothing, for a teacher that reads
        the student's ids. `fused` may choose hidden states and output layer instead. Raises ValueError for longer rows
        than the model can take, and for packed ones if it does not keep examples apart; and what `ServedModel.ask` and
        its results raise.
        """
        cached: AnyLogits | None = entry.get("logits")
        if cached is not None:
            return cached
        source = read_by(entry, inputs)
        device = inputs["input_ids"].device
        if self.served is not None:
            asked: Asked = entry.get("asked") or Asked(self.served, source)
            return asked.logits().to(device, non_blocking=True)
        if self.model is None:
            raise ValueError(f"{self.name}: expected cached logits in the batch, since it has no model")
        names = ("input_ids", "attention_mask", "position_ids")
        given: dict[str, Any] = {
            name: source[name].to(self.device or device) for name in names if source.get(name) is not None
        }
        if source["input_ids"].device.type == "cpu":  # elsewhere `check_entry` has looked at what is on the host
            self.limits.check(source, self.name)
        given["input_ids"] = self.limits.fit(given)
        if not self._packing_is_known and is_packed(source):
            fault = self.packing_fault(given["input_ids"], given["input_ids"].shape[1], "attention_mask" in given)
            if fault is not None:
                raise ValueError(f"{self.name}: {PACKED}, since {fault}")
        given["use_cache"] = False
        made = self.model(**given) if fused is None else fused.outputs(self.model, self.model, self.name, **given)
        logits: AnyLogits = made.logits
        if isinstance(logits, OrderedLogits):
            raise ValueError(
                f"{self.name}: expected logits in its tokenizer's order, got OrderedLogits: an ordered_layer is for "
                "loops of your own, and does not become the model's"
            )
        return logits.to(device) if isinstance(logits, Tensor) else logits


def check_same_bytes(
    alignment: Alignment, student_ids: Tensor, teacher_ids: Tensor, student: Vocabulary, teacher: Vocabulary, name: str
) -> None:
    """Raises ValueError if most chunks of a batch do not spell the same bytes on both sides.

    A few may differ where a tokenizer normalises text; with ids of another tokenizer nearly all do.
    """
    spans, same = alignment.spans.tolist(), 0
    for (a, b, c, d), sample in zip(spans, alignment.sample_index.tolist(), strict=True):
        same += student.decode(student_ids[sample, a:b].cpu()) == teacher.decode(teacher_ids[sample, c:d].cpu())
    if same < SAME_BYTES_SHARE * len(spans):
        raise ValueError(
            f"{name}: expected chunks that spell the same text on both sides, but only {same} of {len(spans)} do; "
            "were its ids, or the student's, made by another tokenizer?"
        )
