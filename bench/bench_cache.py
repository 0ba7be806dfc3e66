"""What a teacher cache costs and what it loses: bytes a token on disk, and KL from the full teacher, by top_k.

The teacher is SmolLM2-135M-Instruct, the text the Python reference manual. The KL divergence is that of the teacher's
full distribution from the one that a loss sees when it reads the cache (listed tokens, uniform tail), in nats a token,
mean over all rows. Results go to bench/results/cache.json.

    python bench/bench_cache.py [--passages 48] [--top-k 8 16 32 64 128 256 512]
"""

from __future__ import annotations

import platform
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measure import machine, parser, write


class Recorded:
    """A model that has run before: logits by the ids of a document, so that every `top_k` reads the same ones."""

    def __init__(self, model: Any, documents: list[list[int]]) -> None:
        self.rows = {}
        with torch.inference_mode():
            for ids in documents:
                self.rows[tuple(ids)] = model(input_ids=torch.tensor([ids])).logits[0]

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        length = int(attention_mask.sum())
        return SimpleNamespace(logits=self.rows[tuple(input_ids[0, :length].tolist())][None])


def main() -> None:
    arguments = parser(__doc__, "cache.json")
    arguments.add_argument("--passages", type=int, default=48)
    arguments.add_argument("--top-k", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    options = arguments.parse_args()
    from xtoken import cache_teacher, demo
    from xtoken.losses.logits import TopKSource

    model, tokenizer = demo.load_teacher()
    training, _ = demo.manual_passages()
    texts = sorted(set(training))[:: max(1, len(training) // options.passages)][: options.passages]
    documents = [tokenizer(text)["input_ids"] for text in texts]
    started = time.perf_counter()
    recorded = Recorded(model, documents)
    seconds = time.perf_counter() - started
    tokens = sum(map(len, documents))
    rows = []
    for top_k in options.top_k:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            cache = cache_teacher(recorded, tokenizer, documents, folder, top_k=top_k, batch_tokens=1)
            writing = time.perf_counter() - started
            size = sum(path.stat().st_size for path in Path(folder).iterdir())
            divergence = tail = 0.0
            for ids in documents:
                full = recorded.rows[tuple(ids)][:, : cache.vocab_size].double().log_softmax(-1)
                logits = cache.lookup(ids).logits
                seen = TopKSource(logits.ids[None], logits.logprobs[None], logits.tail, cache.vocab_size)
                divergence += float((full.exp() * (full - seen.rows(0, len(ids)).double())).sum())
                tail += float((1 - logits.logprobs.double().exp().sum(1)).sum())
        rows.append(
            {
                "top_k": cache.top_k,
                "bytes_per_token": size / tokens,
                "kl_nats_per_token": divergence / tokens,
                "tail_probability": tail / tokens,
                "share_of_forward_time": writing / seconds,
            }
        )
    versions = machine("torch", python=platform.python_version())
    write(options.output, {"versions": versions, "teacher": "SmolLM2-135M-Instruct", "tokens": tokens, "rows": rows})
    print("| top_k | bytes/token | tail, % | KL, nats/token |\n| ---: | ---: | ---: | ---: |")
    for row in rows:
        print(
            f"| {row['top_k']} | {row['bytes_per_token']:,.0f} | {100 * row['tail_probability']:.2f} | "
            f"{row['kl_nats_per_token']:.4f} |"
        )


if __name__ == "__main__":
    main()
