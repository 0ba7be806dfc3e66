"""Adapters: LoRA on the student (peft), which checkpoint goes with which model, and merging into the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from xtoken.corpus import require
from xtoken.losses.call import check_count

from .checkpoints import saving
from .option import option
from .quantized import quantization_config

CONFIG = "adapter_config.json"
GENERATION = "generation_config.json"
FILES = (CONFIG, "adapter_model.safetensors", "README.md", GENERATION)
"""What peft saves of an adapter, and how text is generated with it."""
ASIDE = "adapter"
"""Folder of the adapter beside the student that it is merged into."""

SHAPING = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "modules_to_save")
"""Settings without which an adapter's weights mean something else."""


@dataclass
class AdapterArguments:
    """Adapters in place of the student's own weights.

    Parameters
    ----------
    lora_rank : int, optional
        Of the LoRA adapters; None: the student's own weights are trained.
    lora_alpha : float, optional
        Their factor is ``lora_alpha / lora_rank``. Default: twice the rank.
    lora_dropout : float
        Share of their inputs that is dropped, below 1.
    lora_target_modules : sequence of str, optional
        Modules that have one, by the last parts of their names. Default: all linear layers but the output layer.
    lora_modules_to_save : sequence of str, optional
        Modules that are trained whole beside them.
    student_quantization : str, optional
        Weights of the student below them in 8 or 4 bits; see `xtoken.train.quantized.quantization_config`.
    """

    lora_rank: int | None = option(
        None, "train adapters of this rank (LoRA, by peft) in place of the student's weights"
    )
    lora_alpha: float | None = option(None, "their factor is lora_alpha / lora_rank; default: twice the rank")
    lora_dropout: float = option(0.0, "share of their inputs that is dropped")
    lora_target_modules: list[str] | None = option(
        None,
        "modules that have one, by the last parts of their names, such as q_proj v_proj; default: all "
        "linear layers but the output layer",
    )
    lora_modules_to_save: list[str] | None = option(
        None, "modules that are trained whole beside them, such as embed_tokens lm_head"
    )
    student_quantization: str | None = option(
        None, "the student in 8 or 4 bits below adapters, as --teacher_quantization"
    )

    def check_adapters(self) -> None:
        """Raises ValueError for values out of range, and for options without a rank; ImportError without peft."""
        if self.lora_rank is None:
            alone = [one.name for one in fields(AdapterArguments) if getattr(self, one.name) != one.default]
            if alone == ["student_quantization"]:
                raise ValueError(
                    "student_quantization: expected lora_rank with it, since weights in 8 or 4 bits cannot be trained "
                    f"themselves, got {self.student_quantization} alone"
                )
            if alone:
                raise ValueError(f"{alone[0]}: expected lora_rank with it, got none")
            return
        check_count(self.lora_rank, "lora_rank")
        if self.lora_alpha is not None and not 0.0 < self.lora_alpha < float("inf"):
            raise ValueError(f"lora_alpha: expected a finite number above 0, got {self.lora_alpha}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout: expected a share of at least 0 and below 1, got {self.lora_dropout}")
        require("peft", "peft")
        quantization_config(self.student_quantization)


def add_lora(model: Any, options: AdapterArguments) -> Any:
    """The model with new adapters, which alone are trained: a PeftModel.

    Embeddings that share their weight with the output layer share it on, if they are trained whole. Raises ValueError
    for a module that the model does not have, and for an adapter of such embeddings.
    """
    peft = require("peft", "peft")
    targets, whole = options.lora_target_modules or ["all-linear"], options.lora_modules_to_save or []
    _check_names(model, "lora_target_modules", [one for one in targets if one != "all-linear"])
    _check_names(model, "lora_modules_to_save", whole)
    is_tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    ends = [model.get_input_embeddings(), model.get_output_embeddings()] if is_tied else []
    shared = {name.rpartition(".")[2] for name, module in model.named_modules() if any(module is one for one in ends)}
    if found := sorted(shared.intersection(targets)):
        raise ValueError(
            f"lora_target_modules: expected no embeddings that share their weight with the output layer, got "
            f"{found[0]}; lora_modules_to_save trains them whole"
        )
    assert options.lora_rank is not None
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_rank,
        lora_alpha=options.lora_alpha or 2 * options.lora_rank,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear" if "all-linear" in targets else targets,
        modules_to_save=whole or None,
        ensure_weight_tying=bool(shared.intersection(whole)),
    )
    return peft.get_peft_model(model, config)


def _check_names(model: Any, option: str, wanted: Iterable[str]) -> None:
    modules = dict(model.named_modules())
    for one in wanted:
        if not any(name == one or name.endswith(f".{one}") for name in modules):
            linear = {name.rpartition(".")[2] for name, module in modules.items() if hasattr(module, "in_features")}
            raise ValueError(
                f"{option}: expected the name of a module, got {one!r}, which the student does not have; its linear "
                f"layers are {', '.join(sorted(linear))}"
            )


def base_of(model: Any) -> Any:
    """The model within a PeftModel, with the adapters in its layers; any other model as it is."""
    return getattr(model, "get_base_model", lambda: model)()


def prepare(model: Any, options: AdapterArguments, checkpoints_gradients: bool) -> Any:
    """The student ready for training: with new adapters, if it is to have some and has none yet.

    Raises ValueError for weights in full that should be in 8 or 4 bits; what `add_lora` raises; for prompts that are
    learned, since they add rows which belong to no token; where nothing can be trained, as of an adapter that was
    loaded for inference; and for weights that bitsandbytes has packed for inference.
    """
    if options.student_quantization not in (None, "none") and getattr(model, "quantization_method", None) is None:
        raise ValueError(
            f"student_quantization: expected a student that is loaded by its name, or in 8 or 4 bits already, got "
            f"{type(model).__name__} in full"
        )
    configs: Any = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        if options.lora_rank is None:
            return model
        model = add_lora(model, options)
        configs = model.peft_config
    for name, config in configs.items():
        if config.is_prompt_learning:
            raise ValueError(
                f"model: expected adapters in its layers, as LoRA's, got {config.peft_type.value} ({name}), whose rows "
                "belong to no token"
            )
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError(
            "model: expected an adapter that can be trained, got one that was loaded for inference; load it by "
            "peft.PeftModel.from_pretrained(model, folder, is_trainable=True)"
        )
    for layer in model.modules():
        if not hasattr(layer, "support_avx512bf16_for_cpu"):  # a 4-bit layer of bitsandbytes
            continue
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError("model: expected weights in 4 bits that have not been run in evaluation on the CPU before")
        layer.support_avx512bf16_for_cpu = False  # else an evaluation packs them so that no gradient goes through
    if checkpoints_gradients:
        model.enable_input_require_grads()  # else a block whose inputs need no gradient may give its weights none
    return model


def check_checkpoint(folder: Path, model: Any) -> None:
    """Raises ValueError if a checkpoint's weights are an adapter's and the model's are not, or the other way round, or
    if it is another adapter."""
    peft_configs: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
    saved = [path for path in (folder / CONFIG, *sorted(folder.glob(f"*/{CONFIG}"))) if path.exists()]
    if bool(saved) != bool(peft_configs):
        has, wants = ("an adapter", "none") if saved else ("the weights of a whole model", "an adapter")
        raise ValueError(f"resume_from_checkpoint: {folder} has {has}, but this run trains {wants} (lora_rank)")
    for path in saved:
        name = "default" if path.parent == folder else path.parent.name
        then = type(peft_configs[name]).from_pretrained(path.parent) if name in peft_configs else None
        for setting in SHAPING if then is not None else ():
            before, now = (_plain(getattr(one, setting, None)) for one in (then, peft_configs[name]))
            if before != now:
                raise ValueError(
                    f"resume_from_checkpoint: expected an adapter with {setting}={now}, as this run has it, got "
                    f"{before} in {path}"
                )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, list, tuple)) else value


def is_adapter(source: Any) -> bool:
    """Whether a folder holds an adapter in place of a model."""
    return (Path(source) / CONFIG).is_file()


def base_source(folder: Any) -> str:
    """What an adapter was made for: a folder or Hub id."""
    name = require("peft", "peft").PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not name:
        raise ValueError(f"source: {Path(folder) / CONFIG} does not say which model the adapter is for")
    return str(name)


def merged(model: Any, folder: Any) -> Any:
    """The model with an adapter of it, from a folder, added to its weights."""
    peft = require("peft", "peft")
    return peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload(safe_merge=True)


def save_generation(model: Any, folder: Path) -> None:
    """Saves beside the adapters of a model how it generates text, as `load_model` reads it: a Trainer has aligned the
    tokens that begin and end a text with its tokenizer, and peft saves nothing of it."""
    config = getattr(model, "generation_config", None)
    if config is not None and getattr(model, "peft_config", None):
        config.to_json_file(folder / GENERATION)


def load_generation(model: Any, folder: Path) -> None:
    """Makes it that of a model, if it was saved."""
    if (folder / GENERATION).is_file():
        model.generation_config = type(model.generation_config).from_pretrained(folder)


def save_merged(model: Any, folder: Path, trained: Any) -> None:
    """Saves the model with the adapter that lies in a folder added to its weights, and the adapter in ``adapter``.

    Tokens that begin and end a text, and how it is generated, are those of `trained`, which a Trainer has aligned with
    its tokenizer.
    """
    aside = folder / ASIDE
    aside.mkdir(exist_ok=True)
    for name in FILES:
        if (folder / name).exists():
            (folder / name).replace(aside / name)
    made = merged(model, aside)
    made.generation_config = trained.generation_config
    ours, theirs = (one.config.get_text_config() for one in (made, trained))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(ours, name, getattr(theirs, name))
    with saving(folder):
        made.save_pretrained(folder)
