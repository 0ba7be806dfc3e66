"""The documentation's tables of measurements, made from the files in bench/results.

    python bench/tables.py            # writes them into README.md and docs/*.md
    python bench/tables.py --check    # writes nothing; exit status 1 if one is out of date

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from measure import RESULTS, ROOT
from reproduce import EMA, FACTOR, OPTIONS, SETTINGS, Lead, Values, arms, unit, values

LEVELS = ("avx512", "avx2", "portable")
"""Of the CPU kernels, the fastest first."""

PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def documents() -> list[Path]:
    """The files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def results(name: str) -> Any:
    """A result file, parsed."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table whose first `words` columns are text and the others numbers."""
    rule = ["---" if i < words else "---:" for i in range(len(header))]
    return "".join(f"| {' | '.join(row)} |\n" for row in [header, rule, *rows])


def alignment() -> str:
    """Speed of the alignment methods."""
    rows = results("align")["rows"]
    header = ("tokens a document", "method", "threads", "M tokens/s", "share of tokenization, %", "times 1 thread")
    cells = [
        (
            f"{row['document_tokens']:,}",
            f"`{row['method']}`",
            str(row["threads"]),
            f"{row['million_tokens_per_second']:.0f}",
            f"{100 * row['share_of_tokenization']:.1f}",
            f"{row['times_one_thread']:.2f}",
        )
        for row in rows
    ]
    return markdown(header, cells, words=2)


def losses() -> str:
    """Speed of the losses on two threads at the highest level measured, beside cross-entropy and the plain formulas."""
    timed = [row for row in results("losses")["rows"] if row.get("threads") == 2 and "of_cross_entropy" in row]
    level = next(level for level in LEVELS if any(row["level"] == level for row in timed))
    found = {(row["loss"], row["type"]): row for row in timed if row["level"] == level}
    header = ["loss"]
    for kind in ("fp32", "bf16"):
        header += [f"{kind}, ms a row", "of cross-entropy", "times plain"]
    rows = []
    for loss in dict.fromkeys(loss for loss, _ in found):
        row = [loss]
        for kind in ("fp32", "bf16"):
            one = found[loss, kind]
            times = one.get("times_reference")
            row += [f"{one['ms_per_row']:.2f}", f"{one['of_cross_entropy']:.2f}", f"{times:.0f}" if times else ""]
        rows.append(row)
    return markdown(header, rows)


def gpu() -> str:
    """Time of the losses on the GPU that was measured, beside torch's cross-entropy and the plain formulas."""
    speed = results(GPU)["speed"]
    found = {row["name"]: row for row in speed["rows"] if "ms" in row}
    cross_entropy = found["torch cross_entropy"]

    def of_device(row: dict[str, Any]) -> float:
        """Milliseconds of a row's step without Python, as far as that could be measured."""
        return float(row["replay_ms"] or row["ms"]) / int(row["rows"])

    header = ["loss", "step, ms", "graph replay, ms", "of cross-entropy", "times plain", "of a copy's bandwidth, %"]
    rows = []
    for name, row in found.items():
        if row is cross_entropy or ", torch.compile" in name or name.endswith(PLAIN):
            continue
        plain = found.get(name + PLAIN)
        rows.append([
            name,
            f"{row['ms']:.2f}",
            f"{row['replay_ms']:.2f}" if row["replay_ms"] else "",
            f"{of_device(row) / of_device(cross_entropy):.2f}",
            f"{of_device(plain) / of_device(row):.0f}" if plain else "",
            f"{100 * row['of_copy'] * row['us_per_row'] / 1e3 / of_device(row):.0f}",
        ])  # fmt: skip
    return markdown(header, rows)


def cache() -> str:
    """What a teacher cache costs and loses."""
    header = ("top_k", "bytes a token", "tail, %", "KL, nats a token", "writing, % of a forward pass")
    rows = [
        (
            str(row["top_k"]),
            f"{row['bytes_per_token']:,.0f}",
            f"{100 * row['tail_probability']:.1f}",
            f"{row['kl_nats_per_token']:.3f}",
            f"{100 * row['share_of_forward_time']:.1f}",
        )
        for row in results("cache")["rows"]
    ]
    return markdown(header, rows, words=0)


def accuracy(seeds: int) -> str:
    """Exact match at the end of `reproduce.py`, percent: mean and range of what ran in every setting with so many seeds
    or more."""
    settings = ("plenty", "little", "mirror")
    found = [values(results("reproduce"), setting) for setting in settings]
    whole = {arm: [one[arm]["exact match"] for one in found] for arm in found[0] if all(arm in one for one in found)}
    whole = {arm: at for arm, at in whole.items() if min(map(len, at)) >= seeds}

    def cell(at: dict[int, float]) -> str:
        least, most = 100 * min(at.values()), 100 * max(at.values())
        return f"{100 * statistics.fmean(at.values()):.1f}" + (f" ({least:.0f} to {most:.0f})" if most > least else "")

    ordered = sorted(whole.items(), key=lambda item: -statistics.fmean(item[1][0].values()))
    rows = [("none" if arm == "CE" else arm, *map(cell, at)) for arm, at in ordered]
    return markdown(("loss beside cross-entropy", "plenty of text", "little text", "numbers whole"), rows)


def weighting() -> str:
    """Of `reproduce.py` with wrong answers exact match / probability of the right answer, percent; and what weights of
    inner boundaries add to both, with the standard errors of the differences."""
    settings = ("scratch", "continued", "random", "right")
    found = [values(results("reproduce"), setting) for setting in settings]
    measures = ("exact match", "probability")
    arms = [arm for arm in found[-1] if all(arm in one for one in found)]

    def means(one: Values, arm: str) -> str:
        return " / ".join(f"{100 * statistics.fmean(one[arm][measure].values()):.1f}" for measure in measures)

    def lead(one: Values, arm: str, other: str) -> str:
        leads = [Lead.of(one, arm, other, measure) for measure in measures]
        return " / ".join(found.text(100) for found in leads if found)

    rows = [(arm, *(means(one, arm) for one in found)) for arm in arms]
    for arm in arms:
        other = arm.replace(" teacher", "")
        if other != arm:
            rows.append((f"{arm}, over none", *(lead(one, arm, other) for one in found)))
    seeds = min(len(one[arm]["probability"]) for one in found for arm in arms)
    header = ("half wrong, from scratch", "half wrong", "all wrong, no CE on sums", "all right")
    return markdown((f"beside cross-entropy ({seeds} seeds)", *header), rows)


def _percent(measured: dict[str, dict[int, float]], measure: str) -> str:
    at = measured.get(measure)
    return f"{unit(measure) * statistics.fmean(at.values()):.1f}" if at else ""


def _paper(setting: str, form: str, *others: str) -> str:
    """Of a setting of `reproduce.py` all measures, and the leads in the probability over these arms; without those that
    are for `options`."""
    found = {arm: one for arm, one in values(results("reproduce"), setting).items() if arm not in OPTIONS}
    measures = {"exact match": "exact match", "probability": "probability", f"probability{EMA}": f"probability{EMA}"}
    measures |= {"log-likelihood": "log-likelihood, nats", "form": form}
    rows = []
    for arm in sorted(found, key=lambda arm: -statistics.fmean(found[arm]["probability"].values())):
        leads = [Lead.of(found, arm, other, "probability") for other in others]
        cells = [_percent(found[arm], measure) for measure in measures]
        cells += [lead.text(100) if lead else "" for lead in leads]
        rows.append((arm, *cells, str(len(found[arm]["probability"]))))
    titles = [f"over {'the start' if other == 'start' else other}" for other in others]
    return markdown(("beside cross-entropy", *measures.values(), *titles, "seeds"), rows)


def paper_wrong() -> str:
    """Of `reproduce.py` with wrong answers every loss with a fixed factor: the probability of the right answer, in
    percent, and its lead over cross-entropy alone."""
    found = [values(results("reproduce"), setting) for setting in ("scratch", "continued")]
    shown = [arm for arm in found[0] if arm in found[1] and arm.endswith(FACTOR) and arm not in OPTIONS]
    rows = []
    for arm in ["CE", *sorted(shown, key=lambda arm: -statistics.fmean(found[1][arm]["probability"].values()))]:
        leads = [Lead.of(one, arm, "CE", "probability") for one in found]
        cells = []
        for one, lead in zip(found, leads, strict=True):
            cells += [_percent(one[arm], "probability"), lead.text(100) if lead else ""]
        rows.append((arm, *cells, str(min(len(one[arm]["probability"]) for one in found))))
    return markdown(("beside cross-entropy", "from scratch", "over CE", "continued", "over CE", "seeds"), rows)


def paper_rare() -> str:
    """Students that can add, and few sums."""
    return _paper("rare", "packed numerals", "CE", "start")


def paper_absent() -> str:
    """Students that can add, and no sums."""
    return _paper("absent", "packed numerals", "CE", "start")


def paper_code() -> str:
    """White space that both sides cut differently."""
    return _paper("code", "right indentation", "CE")


def options() -> str:
    """Of losses with other options than their defaults the lead in the probability of the right answer over the latter,
    in points, by setting of `reproduce.py`."""
    settings = [name for name, setting in SETTINGS.items() if setting.variants == OPTIONS]
    found = [values(results("reproduce"), setting) for setting in settings]
    defaults = {arm.case.loss: name for name, arm in arms().items() if arm.is_default and arm.scale == FACTOR}
    rows = []
    for name in OPTIONS:
        leads = [Lead.of(one, name, defaults[arms()[name].case.loss], "probability") for one in found]
        if all(leads):
            rows.append((name, *(lead.text(100) for lead in leads if lead)))
    seeds = min(len(one[name]["probability"]) for one in found for name, *_ in rows)
    return markdown((f"over its default ({seeds} seeds)", *settings), rows)


def training() -> str:
    """Held-out values before and after the runs of `train_real.py`."""
    rows = []
    for name in ("train_demo", "train_gemma", "train_on_policy"):
        history = [row for row in results(name)["history"] if "eval_ce" in row]
        share = results(name).get("on_policy", 0.0)
        run = PAIRS[results(name)["pair"]] + (f", on policy for {share:.0%} of the prompts" if share else "")
        first, last = history[0], history[-1]
        spans = [f"{first[key]:.3f} to {last[key]:.3f}" for key in ("eval_ce", "eval_kd", "eval_agreement")]
        rows.append((run, str(last["step"]), *spans))
    header = ("student from teacher", "steps", "cross-entropy, nats/token", "loss, nats/chunk", "top-1 agreement")
    return markdown(header, rows)


GPU = "gpu-nvidia-h100-80gb-hbm3"
PLAIN = ", plain formula"


def training_memory() -> str:
    """Peak memory and time of a training step from logits, and from hidden states and output layer."""
    rows = results("train_memory")["rows"]
    header = ["tokens", "`--scaling`", "logits, GB", "peak, GB", "fused, GB", "seconds", "fused, seconds", "times"]
    cells = [
        [
            f"{row['rows'] * row['length']:,}",
            row["scaling"],
            *(f"{row[name] / 1e9:.2f}" for name in ("logits_bytes", "peak_bytes_off", "peak_bytes_on")),
            *(f"{row[name]:.1f}" for name in ("seconds_off", "seconds_on")),
            f"{row['seconds_on'] / row['seconds_off']:.2f}",
        ]
        for row in rows
    ]
    return markdown(header, cells, words=2)


def truth() -> str:
    """Where losses lead from the truth: by kind of text the mean over pairs of two tokenizers, and the worst pair; of
    losses that were measured for every pair."""
    rows = [row for row in results("truth")["rows"] if len(set(row["pair"].split("/"))) == 2]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    pairs = len({row["pair"] for row in rows})
    cells = {loss: [_of_pairs(rows, loss, kind) for kind in kinds] for loss in dict.fromkeys(r["loss"] for r in rows)}
    cells = {loss: one for loss, one in cells.items() if all(len(values) == pairs for values in one)}
    ordered = sorted(cells.items(), key=lambda item: statistics.fmean(statistics.fmean(one) for one in item[1]))
    body = [(loss, *(f"{statistics.fmean(one):.3f} ({max(one):.2f})" for one in row)) for loss, row in ordered]
    return markdown(("loss", *kinds), body)


def _of_pairs(rows: Sequence[Any], loss: str, kind: str) -> list[float]:
    """The bias for each pair, of its rows where chunks start and inside chunks the worse."""
    return _worse([row for row in rows if (row["loss"], row["kind"]) == (loss, kind)])


def _worse(rows: Sequence[Any]) -> list[float]:
    """The bias for each pair and kind of text, of the two sorts of rows the worse."""
    worst: dict[tuple[str, str], float] = {}
    for row in rows:
        key = row["pair"], row["kind"]
        worst[key] = max(row["bias"], worst.get(key, 0.0))
    return list(worst.values())


def truth_by_pair() -> str:
    """Where losses lead from the truth: by pair of two tokenizers the mean over kinds of text, and the worst kind."""
    rows = [row for row in results("truth")["rows"] if len(set(row["pair"].split("/"))) == 2]
    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    cells: dict[str, list[list[float]]] = {}
    for loss in dict.fromkeys(row["loss"] for row in rows):
        cells[loss] = [_worse([row for row in rows if (row["loss"], row["pair"]) == (loss, pair)]) for pair in pairs]
    ordered = sorted(cells.items(), key=lambda item: statistics.fmean(statistics.fmean(one) for one in item[1] if one))
    body = [
        (loss, *(f"{statistics.fmean(one):.3f} ({max(one):.2f})" if one else "-" for one in row))
        for loss, row in ordered
    ]
    return markdown(("loss", *pairs), body)


def truth_on_events() -> str:
    """By pair and kind where the first loss on events leads from the truth, in rows where chunks start / inside."""
    rows = [row for row in results("truth")["rows"] if row["needs"] == "pieces"]
    loss, kinds = rows[0]["loss"], list(dict.fromkeys(row["kind"] for row in rows))
    found = {(row["pair"], row["kind"], row["sort"]): f"{row['bias']:.3f}" for row in rows if row["loss"] == loss}
    body = [
        (title, *(" / ".join(found.get((pair, kind, sort), "-") for sort in ("start", "inner"))
        for kind in kinds))
        for pair, title in dict.fromkeys((row["pair"], row["title"]) for row in rows)
    ]  # fmt: skip
    return markdown(("student from teacher", *kinds), body)


def events() -> str:
    """By text and pair the share of starts that differ, before and after calibration, and what is kept, in percent."""
    rows = results("events")["rows"]
    found = {
        (row["text"], row["pair"]): f"{row['differing_percent_before']:.2f} to {row['differing_percent']:.2f} "
        f"({row['information_kept_percent']:.1f})"
        for row in rows
    }
    pairs, kinds = (list(dict.fromkeys(row[name] for row in rows)) for name in ("pair", "text"))
    return markdown(("text", *pairs), [(kind, *(found[kind, pair] for pair in pairs)) for kind in kinds])


def trl() -> str:
    """Losses of TRL and of this library on the same logits and text, without what is for other text."""
    body = [
        (row["loss"], f"{row['CPU seconds']:.2f}", f"{row['peak MB']:,}", f"{row['value']:.4g}")
        for row in results("trl")["rows"]
        if not row["loss"].endswith(", numbers")
    ]
    return markdown(("loss", "CPU seconds", "peak MB", "value"), body)


def quantized() -> str:
    """What a teacher in 8 or 4 bits costs and loses."""
    body = [
        (
            "in full" if row["weights"] == "none" else f"`{row['weights']}`",
            row["dtype"],
            f"{row['MB']:.0f}",
            f"{row['CPU seconds']:.1f}",
            f"{row['KL, nats a token']:.4f}",
            f"{100 * row['same first choice']:.1f}",
        )
        for row in results("quantized")["rows"]
    ]
    return markdown(
        ("weights", "the rest", "MB", "CPU seconds", "KL, nats a token", "same first choice, %"), body, words=2
    )


def real(setting: str) -> str:
    """What the students of `real.py` are at the end."""
    return real_table(results("real"), setting)


def real_table(found: Any, setting: str) -> str:
    """By loss the means over the seeds; in brackets the lead over cross-entropy alone with the same seed, or over the
    start where that did not run, with its standard error. Shares are in percent."""
    runs = [run for run in found["runs"] if run["setting"] == setting]
    names = list(found["starts"][setting])
    ends: Values = {"start": {name: {run["seed"]: found["starts"][setting][name] for run in runs} for name in names}}
    for run in runs:
        for words, arm in run["arms"].items():
            for name in names:
                ends.setdefault(words, {}).setdefault(name, {})[run["seed"]] = arm["curve"][-1][name]
    baseline = "CE" if "CE" in ends else "start"

    def shown(name: str, value: float, form: str = "") -> str:
        return f"{value:{form}.3f}" if "nats" in name else f"{100 * value:{form}.1f}"

    def cell(words: str, name: str) -> str:
        text = shown(name, statistics.fmean(ends[words][name].values()))
        lead = None if words == "start" else Lead.of(ends, words, baseline, name)
        return f"{text} ({shown(name, lead.mean, '+')} ± {shown(name, lead.error)})" if lead else text

    teacher = found["teachers"][setting]
    rows = [("teacher", *(shown(name, teacher[name]) if name in teacher else "" for name in names), "")]
    for words, of_words in ends.items():
        seeds = "" if words == "start" else str(len(of_words[names[0]]))
        rows.append((words, *(cell(words, name) for name in names), seeds))
    header = [name if "nats" in name else f"{name}, %" for name in names]
    return markdown(("loss", *header, "seeds"), rows)


PAIRS = {
    "demo": "small random Llama from SmolLM2-135M-Instruct",
    "gemma": "SmolLM2-135M-Instruct from Gemma 3 270M",
}


def scale() -> str:
    """What a rank of a vocabulary-parallel loss gives for a chunk."""
    found = results("scale")["sent"]
    ways = list(dict.fromkeys(row["teacher"] for row in found))
    pairs = dict.fromkeys((row["pair"], row["loss"]) for row in found)
    given = {(row["pair"], row["loss"], row["teacher"]): f"{row['numbers_a_chunk']:,}" for row in found}
    header = ("student/teacher", "loss", *("teacher " + way for way in ways))
    return markdown(header, [(*one, *(given.get((*one, way), "") for way in ways)) for one in pairs], words=2)


def plan() -> str:
    """Memory, traffic and time a device of `bench_scale.py`, a column for each way to share out the models."""
    found = results("scale")["plan"]
    names = [name for name in found[0] if name not in ("devices", "tp", "teacher's logits", "groups")]
    header = ("a device", *(f"{row['devices']}, tp {row['tp']}, {row[TEACHER]}" for row in found))
    return markdown(header, [(name, *(f"{row[name]:.3g}" for row in found)) for name in names])


TEACHER = "teacher's logits"


def parallel() -> str:
    """Milliseconds of a processor for forward and backward of a rank; of the largest case also with longer chunks."""
    found = results("scale")["time"]
    names = ("rows", "vocabulary", "chunks")
    most = max((row["rows"], row["vocabulary"]) for row in found)
    sizes = sorted({
        tuple(row[name] for name in names)
        for row in found
        if row["chunks"] == row["rows"] or (row["rows"], row["vocabulary"]) == most
    })  # fmt: skip
    kinds = dict.fromkeys((row["loss"], row["ranks"]) for row in found)
    taken = {(row["loss"], row["ranks"], *(row[name] for name in names)): row["milliseconds"] for row in found}
    few = {size: f", {size[2]:,} chunks" * (size[2] < size[0]) for size in sizes}
    header = ("loss", "ranks", *(f"{size[0]:,} x {size[1]:,}{few[size]}" for size in sizes))
    cells = {key: [taken.get((*key, *size)) for size in sizes] for key in kinds}
    rows = [(key[0], str(key[1]), *("" if ms is None else f"{ms:.0f}" for ms in of)) for key, of in cells.items()]
    return markdown(header, rows)


def scale_alignment() -> str:
    """Nanoseconds of a processor for a token of the student, by the length of a document."""
    found = results("scale")["alignment"]
    lengths = list(dict.fromkeys(row["student_tokens"] for row in found))
    taken = {(row["method"], row["student_tokens"]): row["nanoseconds_a_token"] for row in found}
    methods = dict.fromkeys(row["method"] for row in found)
    rows = [(f"`{one}`", *(f"{taken[one, length]:.1f}" for length in lengths)) for one in methods]
    return markdown(("method", *(f"{length:,} tokens" for length in lengths)), rows)


def scale_tables() -> str:
    """Seconds of a processor to build W and the piece index, by the sizes of the vocabularies."""
    names = ("student_tokens", "teacher_tokens", "entries", "W_seconds", "pieces_seconds")
    rows = [
        [f"{row[name]:,}" if isinstance(row[name], int) else f"{row[name]:.2f}" for name in names]
        for row in results("scale")["tables"]
    ]
    return markdown(("student's tokens", "teacher's tokens", "entries of W", "W, s", "piece index, s"), rows, words=0)


TABLES: dict[str, Callable[[], str]] = {
    "plan": plan,
    "parallel": parallel,
    "scale_alignment": scale_alignment,
    "scale_tables": scale_tables,
    "alignment": alignment,
    "losses": losses,
    "gpu": gpu,
    "cache": cache,
    "accuracy": partial(accuracy, seeds=3),
    "accuracy_of_all": partial(accuracy, seeds=1),
    "weighting": weighting,
    "paper_rare": paper_rare,
    "paper_absent": paper_absent,
    "paper_code": paper_code,
    "paper_wrong": paper_wrong,
    "options": options,
    "training": training,
    "training_memory": training_memory,
    "truth": truth,
    "truth_by_pair": truth_by_pair,
    "truth_on_events": truth_on_events,
    "events": events,
    "trl": trl,
    "quantized": quantized,
    "scale": scale,
    "real_numbers": partial(real, "numbers"),
    "real_numbers_gemma": partial(real, "numbers-gemma"),
    "real_code": partial(real, "code"),
    "real_policy": partial(real, "policy"),
}


def with_tables(text: str) -> str:
    """A document with its tables made anew."""
    return PLACE.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is out of date")
    options = parser.parse_args(arguments)
    stale = [path for path in documents() if with_tables(path.read_text()) != path.read_text()]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'out of date' if options.check else 'written'}")
        if not options.check:
            path.write_text(with_tables(path.read_text()))
    return int(options.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
