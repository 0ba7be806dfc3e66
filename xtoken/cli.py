"""The command ``xtoken``."""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import _core
from .alignment import METHODS, Aligner
from .alignment.pretty import printable, printable_lines
from .audit import NUMERALS, choose_loss, coverage_audit, same_tokens
from .check import self_test
from .config import show_config
from .corpus import align_corpus
from .corpus.options import Options
from .losses import registered
from .pieces import PieceIndex
from .projection import ProjectionMatrix
from .sample import sample_texts
from .vocabulary import Vocabulary

TOKENIZER = "tokenizer: a Hub id, a folder, tokenizer.json, tekken.json, tiktoken ranks, a SentencePiece model or GGUF"


class _Renamed(argparse.Action):
    """An option that has another name now, `const`; says so."""

    def __init__(self, option_strings: Sequence[str], dest: str, const: str) -> None:
        super().__init__(option_strings, dest, "?", const, argparse.SUPPRESS, help=argparse.SUPPRESS)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        parser.error(f"{self.option_strings[0]} is {self.const} now")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="xtoken", description="Distillation of language models across tokenizers.")
    parser.add_argument("--version", action="version", version=f"xtoken {_core.version}")
    parser.add_argument("--debug", action="store_true", help="before the command: show where an error comes from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser("config", help="print what this build can do on this machine")

    check = commands.add_parser("check", help="compare every loss with float64 on this machine, and time it")
    check.add_argument("--device", help="such as cuda:1 or cpu (default: the GPU if there is one)")
    check.add_argument("--losses", nargs="+", choices=tuple(registered()), help="default: all")
    check.add_argument("--rows", type=int, help="of logits; fewer take less memory (default: 64, on the CPU 8)")
    check.add_argument("--json", action="store_true", help="print JSON instead of a table")

    pair = argparse.ArgumentParser(add_help=False)
    pair.add_argument("--student", required=True, help=TOKENIZER)
    pair.add_argument("--teacher", required=True, help=TOKENIZER)

    audit = commands.add_parser("audit", parents=[pair], help="which tokens keep a partner, and which loss to use")
    audit.add_argument("--critical", help="class name or regular expression of the tokens that must survive")
    audit.add_argument(
        "--data", nargs="+", metavar="FILE", help="count tokens as often as they occur at the beginnings of these "
        "files; parquet, jsonl, txt, arrow; globs",
    )  # fmt: skip
    audit.add_argument("--json", action="store_true", help="print JSON instead of a table")

    show = commands.add_parser("show", parents=[pair], help="print a text in both tokenizations, chunk above chunk")
    show.add_argument("text")
    show.add_argument("--method", default="auto", choices=METHODS, help="alignment method (default %(default)s)")
    show.add_argument("--json", action="store_true", help="print JSON instead of coloured lines")

    project = commands.add_parser(
        "project", parents=[pair], help="build the projection matrix W, or the piece index, and write it"
    )
    project.add_argument("--output", required=True, help="file to write (safetensors)")
    project.add_argument("--row-entries", type=int, default=4, help="most entries of a row (default %(default)s)")
    project.add_argument("--top-k", action=_Renamed, const="--row-entries")
    project.add_argument("--beta", type=float, default=0.9, help="weight of the first piece (default %(default)s)")
    project.add_argument("--gamma", type=float, default=0.1, help="factor from piece to piece (default %(default)s)")
    project.add_argument("--pieces", action="store_true", help="build the piece index, in place of W")
    project.add_argument(
        "--texts", nargs="+", metavar="FILE", help="with --pieces: also learn from these files which events the "
        "tokenizers confuse, about 1 MB of them; parquet, jsonl, txt, arrow; globs",
    )  # fmt: skip
    project.add_argument("--reverse", action="store_true", help="also reach teacher tokens that nothing else reaches")

    align = commands.add_parser("align", parents=[pair], help="align a corpus and write parquet shards")
    align.add_argument("--input", required=True, nargs="+", metavar="FILE", help="parquet, jsonl, txt, arrow; globs")
    align.add_argument("--output", required=True, help="folder to write shards and manifest.json to")
    Options.add_to(align)

    report = commands.add_parser("report", help="write a page about a pair of tokenizers, or about a training run")
    report.add_argument("run", nargs="?", metavar="RUN", help="output folder of xtoken train; else a pair is meant")
    report.add_argument("--student", help=TOKENIZER)
    report.add_argument("--teacher", help=TOKENIZER)
    report.add_argument("--text", nargs="+", default=[], help="texts to show in both tokenizations")
    report.add_argument(
        "--data", nargs="+", metavar="FILE", help="files by whose beginnings the coverage is weighted; parquet, jsonl, "
        "txt, arrow; globs",
    )  # fmt: skip
    report.add_argument("-o", "--output", default="report.html", help="file to write (default %(default)s)")

    commands.add_parser("train", add_help=False, help="distil from teachers into a student; see xtoken train --help")

    cache = commands.add_parser("cache-teacher", help="run a teacher once and keep its log-probabilities")
    cache.add_argument("--teacher", required=True, help="model: a folder, a Hub id or a GGUF file")
    cache.add_argument("--url", help="server of vLLM or SGLang that has it by that name, http://host:port/v1, in place "
                       "of running it here; its key is $XTOKEN_TEACHER_KEY")  # fmt: skip
    cache.add_argument("--tokenizer", help="with --url: tokenizer of a teacher whose name only the server knows")
    cache.add_argument("--requests", type=int, default=16, help="requests to it in flight (default %(default)s)")
    cache.add_argument("--timeout", type=float, default=600.0, help="seconds for an answer (default %(default)s)")
    cache.add_argument(
        "--patience", type=float, default=300.0, help="seconds to try again after errors (default %(default)s)"
    )
    cache.add_argument("--data", required=True, nargs="+", metavar="FILE", help="files as for xtoken train; globs")
    cache.add_argument("--output", required=True, help="folder to write to")
    cache.add_argument("--logprobs", type=int, default=128, help="of each token the largest (default %(default)s)")
    cache.add_argument("--top-k", action=_Renamed, const="--logprobs")
    cache.add_argument("--max-length", type=int, help="tokens of a document (default: as many as the model can take)")
    cache.add_argument("--batch-tokens", type=int, default=4096, help="tokens at a time (default %(default)s)")
    cache.add_argument("--text-column", default="text", help="field with plain text (default %(default)s)")
    cache.add_argument(
        "--chat-template", help="for a tokenizer that has none: a file with a chat template, or its text"
    )
    cache.add_argument("--teacher-system", help="what the teacher alone is told, as --teacher_system of xtoken train")
    cache.add_argument("--dtype", default="auto", help="type of the weights (default: as stored)")
    cache.add_argument("--quantization", help="weights in 8 or 4 bits, as --teacher_quantization of xtoken train")
    cache.add_argument("--device", help="where the model runs (default: cuda if there is one, else cpu)")
    cache.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    cache.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")

    demo = commands.add_parser("demo", help="distil a real teacher into a small student, on the CPU in minutes")
    demo.add_argument("--steps", type=int, help="training steps of each student")
    demo.add_argument("--seed", type=int, default=0, help="seed of everything random (default %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    first = 1 if given[:1] == ["--debug"] else 0
    known, rest = given, []
    if given[first : first + 1] == ["train"]:
        known, rest = given[: first + 1], given[first + 1 :]
    options = _parser().parse_args(known)
    try:
        return _run(options, rest)
    except Exception as error:
        if options.debug:
            raise
        is_ours = isinstance(error, (ValueError, TypeError, OSError, ImportError))
        said = (
            str(error) if is_ours else f"{type(error).__name__}: {error} (xtoken --debug {options.command} says where)"
        )
        print(f"xtoken {options.command}: {printable_lines(said)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = "; what is complete stays, go on with --resume" if options.command in ("align", "cache-teacher") else ""
        print(f"xtoken {options.command}: interrupted{hint}", file=sys.stderr)
        return 130


def _show(options: argparse.Namespace) -> str:
    aligner = Aligner(options.student, options.teacher, options.method)
    sides = {"student": aligner.student, "teacher": aligner.teacher}
    ids = {name: side.tokenizer.encode(options.text, add_special_tokens=False).ids for name, side in sides.items()}
    alignment = aligner.align(*ids.values())
    if not options.json:
        return alignment.pretty(*sides.values(), color=sys.stdout.isatty(), width=shutil.get_terminal_size().columns)
    facts = {f"{name}_ids": ids[name] for name in sides}
    for name, side in sides.items():
        facts[f"{name}_tokens"] = [side[i].decode("utf-8", "backslashreplace") for i in ids[name]]
    return printable(json.dumps({**facts, "spans": alignment.spans.tolist()}, ensure_ascii=False))


def _align(options: argparse.Namespace) -> str:
    manifest = align_corpus(options.student, options.teacher, options.input, options.output, **Options.given(options))
    total = manifest.total
    skipped = sum(total.skipped.values())
    return (
        f"{printable(options.output)}: {total.documents} documents in {len(manifest.shards)} shards, "
        f"{total.student_tokens} student and {total.teacher_tokens} teacher tokens in {total.chunks} chunks"
        + (f"; {skipped} broken documents left out" if skipped else "")
    )


def _pieces(options: argparse.Namespace) -> str:
    if not options.pieces:
        raise ValueError("--texts: expected --pieces with it, since W learns from no text")
    own: list[str] = []
    if options.texts:
        from .train.data import text_sample

        own = text_sample(options.texts)
    sides = [Vocabulary.from_tokenizer(one) for one in (options.student, options.teacher)]
    pieces = PieceIndex.build(*sides, texts=[*sample_texts(*sides), *own])
    pieces.save(options.output)
    return f"{printable(options.output)}: {pieces}\n{pieces.merged()}"


def _corpus(data: Sequence[str] | None) -> list[str] | None:
    """Texts from the beginnings of files; None without files."""
    if not data:
        return None
    from .train.data import text_sample

    return text_sample(data)


def _report(options: argparse.Namespace) -> str:
    from . import report

    if (options.run is None) == (options.student is None and options.teacher is None):
        raise ValueError("report: expected --student and --teacher, or the folder of a training run")
    output = Path(options.output)
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ValueError(f"--output: expected a file in a folder that is there, got {options.output}")
    if options.run is not None:
        if options.text or options.data:
            raise ValueError("--text, --data: expected --student and --teacher with them")
        page: Any = report.run_report(options.run)
    else:
        for name in ("student", "teacher"):
            if getattr(options, name) is None:
                raise ValueError(f"--{name}: expected one")
        student, teacher = (
            printable(Path(one).name if Path(one).exists() else one) for one in (options.student, options.teacher)
        )
        page = report.pair_report(
            options.student, options.teacher, names=(student, teacher), texts=options.text, corpus=_corpus(options.data)
        )
    page.save(output)
    return f"{printable(options.output)}: {page}"


def _check(options: argparse.Namespace) -> int:
    tell = None if options.json else functools.partial(print, flush=True)
    report = self_test(options.device, options.losses, rows=options.rows, tell=tell)
    if options.json:
        print(report.to_json())
    return 0 if report.passed else 1


def _run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    if options.command == "config":
        show_config()
    elif options.command == "check":
        return _check(options)
    elif options.command == "audit":
        student, teacher = (Vocabulary.from_tokenizer(one) for one in (options.student, options.teacher))
        report = coverage_audit(student, teacher, critical=options.critical or NUMERALS, corpus=_corpus(options.data))
        pieces = None if same_tokens(student, teacher) else PieceIndex.build(student, teacher)
        choice = choose_loss(student, teacher, report=report, pieces=pieces)
        print(choice.to_json() if options.json else choice)
    elif options.command == "align":
        print(_align(options))
    elif options.command == "show":
        print(_show(options))
    elif options.command == "project" and (options.pieces or options.texts):
        print(_pieces(options))
    elif options.command == "project":
        matrix = ProjectionMatrix.build(
            options.student, options.teacher, options.row_entries, options.beta, options.gamma, options.reverse
        )
        matrix.save(options.output)
        print(f"{printable(options.output)}: {matrix}")
    elif options.command == "report":
        print(_report(options))
    elif options.command == "train":
        from .train import command

        command.main(rest)
    elif options.command == "cache-teacher":
        from .train import cached

        print(printable(cached.main(options)))
    elif options.command == "demo":
        from . import demo

        demo.run(**{"seed": options.seed, **({"steps": options.steps} if options.steps else {})})
    return 0
