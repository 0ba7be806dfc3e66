"""What a model can take: ids that its output layer has a row for, and as many positions as it knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from xtoken.vocabulary import Vocabulary


def output_layer(model: Any) -> Any:
    """Of a model of transformers; None if it has none, or is another's."""
    return getattr(model, "get_output_embeddings", lambda: None)()


def text_config(model: Any) -> Any:
    """A model's configuration, of one that also sees or hears that of its text model; None if it has none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def head_rows(model: Any) -> int | None:
    """Rows of a model's output layer; None where there is none to look at."""
    head = output_layer(model)
    if head is None or not hasattr(head, "weight"):
        return None
    # A quantised layer's weight may be a method, or packed; a sharded one's is elsewhere. Else it is what counts: the
    # layer that peft makes for shared embeddings has its sizes the other way round.
    weight = head.weight
    if hasattr(head, "out_features") and not (type(weight) is nn.Parameter and weight.dim() == 2 and weight.numel()):
        return int(head.out_features)
    return int(getattr(head.weight, "ds_shape", head.weight.shape)[0])


def check_head(model: Any, vocabulary: Vocabulary, name: str) -> None:
    """Raises ValueError if a model's output layer lacks a row for a token of text.

    Special tokens may be beyond it, as the image token of Gemma 3 is for its text models: no text becomes one.
    """
    rows, text = head_rows(model), np.flatnonzero(vocabulary.is_text)
    if rows is not None and len(text) and rows <= text[-1]:
        raise ValueError(
            f"{name}: expected an output layer of at least {text[-1] + 1} rows, one for each token of text of its "
            f"tokenizer, got {rows}; use the tokenizer that it was trained with, or call model.resize_token_embeddings"
        )


def most_positions(model: Any) -> int | None:
    """Tokens of the longest row that a model can take, by its configuration; None: any."""
    config = text_config(model)
    if getattr(config, "alibi", False):
        return None
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        return None
    # RoBERTa and its kin begin to count behind the padding's position, which their configuration counts too.
    tables = [one for path, one in model.named_modules() if path.endswith("position_embeddings")]
    taken = [one.padding_idx + 1 for one in tables if getattr(one, "padding_idx", None) is not None]
    return limit - max(taken, default=0) - hasattr(config, "ngram")  # ProphetNet asks for the next position too


@dataclass(frozen=True)
class Limits:
    """The limits of one model."""

    rows: int | None = None
    """Ids that its embedding and output layer have, where its tokenizer has more."""
    positions: int | None = None
    pad: int = -1
    """The tokenizer's pad token, which may be beyond the rows: whatever stands there is not looked at."""

    @classmethod
    def of(cls, model: Any, vocabulary: Vocabulary | None, name: str) -> Limits:
        """Raises ValueError as `check_head` does."""
        rows, pad = None, -1
        if vocabulary is not None:
            check_head(model, vocabulary, name)
            found = head_rows(model)
            if found is not None and found < len(vocabulary):
                roles = vocabulary.roles
                rows, pad = found, roles["pad"] if "pad" in roles and roles["pad"] != roles.get("eos") else -1
        return cls(rows, most_positions(model), pad)

    def check(self, side: Mapping[str, Any], name: str) -> None:
        """Raises ValueError if rows of a batch, on the host, have an id beyond the output layer, or are too long."""
        ids, mask = side["input_ids"], side.get("attention_mask")
        length, positions = ids.shape[1], side.get("position_ids")
        if self.positions is not None and length > self.positions and positions is not None:
            length = int(positions.max()) + 1  # of packed rows the longest example counts
        if self.positions is not None and length > self.positions:
            raise ValueError(
                f"{name}: expected rows of at most {self.positions} tokens, the positions that it has by its "
                f"configuration, got {length}; give the encoder a lower max_length or max_teacher_length"
            )
        if self.rows is None:
            return
        bad = (ids >= self.rows) & (ids != self.pad)
        bad = bad if mask is None else bad & (mask != 0)
        if bool(bad.any()):
            sample, position = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{name}: expected token ids below {self.rows}, the rows of its output layer, got "
                f"{int(ids[sample, position])} in sample {sample} at position {position}: a special token of its "
                "tokenizer that the model does not know; leave it out of the data, or call "
                "model.resize_token_embeddings"
            )

    def fit(self, side: Mapping[str, Any]) -> Tensor:
        """The ids of a batch, with others that the embedding has where it has none for padding."""
        ids: Tensor = side["input_ids"]
        if self.rows is None:
            return ids
        is_padding = ids == self.pad
        if side.get("attention_mask") is not None:
            is_padding |= side["attention_mask"] == 0
        return torch.where(is_padding, ids.clamp_max(self.rows - 1), ids)


class KnownPad(TrainerCallback):
    """Gives a model its own pad token back where the Trainer has taken over one from the tokenizer that is beyond its
    rows: with that in its configuration it could not be loaded."""

    def __init__(self, model: Any, rows: int) -> None:
        self.rows = rows
        self.own = [getattr(one, "pad_token_id", None) for one in self._configs(model)]

    @staticmethod
    def _configs(model: Any) -> tuple[Any, Any]:
        return text_config(model), getattr(model, "generation_config", None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer has done so by then."""
        for config, own in zip(self._configs(kwargs["model"]), self.own, strict=True):
            if (getattr(config, "pad_token_id", None) or 0) >= self.rows:
                config.pad_token_id = own
