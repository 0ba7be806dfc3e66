"""Weights in 8 and 4 bits: what transformers' ``quantization_config`` is by name, as JSON or in a file."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xtoken.corpus import require
from xtoken.storage import read_yaml

logger = logging.getLogger(__name__)

PACKAGES = {
    "int8": "torchao",
    "int4": "torchao",
    "llm.int8": "bitsandbytes",
    "nf4": "bitsandbytes",
    "fp4": "bitsandbytes",
}
"""Of each name what computes with such weights."""


def quantization_config(given: Any, dtype: torch.dtype | str = "auto") -> Any:
    """What ``from_pretrained`` takes as its ``quantization_config``; None for None and "none".

    Parameters
    ----------
    given : str, path, mapping or object
        A name: "int8" and "int4" (weights only, by torchao); "llm.int8", "nf4" and "fp4" (bitsandbytes; the 4-bit ones
        with their scales quantised too). JSON or a YAML or JSON file: the configuration's fields, with
        ``quant_method``. Or a configuration of transformers, which stays as it is.
    dtype
        What 4-bit weights of bitsandbytes are computed in; "auto" is bfloat16.

    Raises ValueError for other text, and fields that say no method; FileNotFoundError if there is no such file;
    ImportError if the package is not installed.
    """
    if given is None or given == "none":
        return None
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if isinstance(given, (str, os.PathLike)) and given not in PACKAGES:
        given = _fields(str(given))
    if isinstance(given, Mapping):
        return _from_fields(dict(given))
    if not isinstance(given, str):
        return given
    require(PACKAGES[given], PACKAGES[given])
    if given == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if given == "int4":
        if importlib.util.find_spec("mslk") is None:
            raise ImportError("int4 of torchao needs mslk, for GPUs; nf4, by bitsandbytes, has 4 bits on CPUs too")
        from torchao.quantization import Int4WeightOnlyConfig

        return TorchAoConfig(Int4WeightOnlyConfig())
    if given == "llm.int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=given, bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
    )  # fmt: skip


def _fields(text: str) -> dict[str, Any]:
    """A configuration's fields, from JSON or a file."""
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"quantization: expected JSON, got {text!r:.200}: {error}") from error
    elif text.endswith((".json", ".yaml", ".yml")):
        found = read_yaml(Path(text), f"quantization: {text}")
    else:
        raise ValueError(
            f"quantization: expected {', '.join(PACKAGES)}, none, JSON or a file (.json, .yaml) with the fields of a "
            f"quantization_config, got {text!r}"
        )
    if not isinstance(found, dict):
        raise ValueError(f"quantization: expected fields and their values, got {type(found).__name__} in {text}")
    return found


def _from_fields(fields: dict[str, Any]) -> Any:
    from transformers.quantizers import AutoQuantizationConfig

    method = fields.get("quant_method")
    if method is None and not fields.keys() & {"load_in_4bit", "load_in_8bit"}:
        raise ValueError(f"quantization: expected quant_method among its fields, got {', '.join(sorted(fields))}")
    if method in (None, *PACKAGES.values()):
        require(method or "bitsandbytes", method or "bitsandbytes")
    return AutoQuantizationConfig.from_dict(fields)


def check_layers(model: Any, name: str) -> None:
    """Raises ValueError if no linear layer but the output layer is quantised, as where widths do not fit; says of how
    many some are not."""
    head = model.get_output_embeddings()
    linear = {path: one for path, one in model.named_modules() if hasattr(one, "in_features") and one is not head}
    plain = [path for path, one in linear.items() if type(one) is nn.Linear and type(one.weight) is nn.Parameter]
    if len(plain) == len(linear):
        widths = ", ".join(str(width) for width in sorted({one.in_features for one in linear.values()}))
        raise ValueError(f"quantization: expected linear layers that it can take in {name}, got inputs of {widths}")
    if plain:
        logger.warning("%s: %d of %d linear layers are not quantised, as %s", name, len(plain), len(linear), plain[0])


def stays(model: Any) -> bool:
    """Whether a model must not be moved from the device that it was loaded to."""
    return getattr(model, "quantization_method", None) == "bitsandbytes"
