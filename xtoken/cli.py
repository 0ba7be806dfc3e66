"""The command ``xtoken``."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="xtoken", description="Distillation of language models across tokenizers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser("config", help="print what this build can do on this machine")

    pair = argparse.ArgumentParser(add_help=False)
    pair.add_argument("--student", required=True, help="tokenizer: a Hub id, a folder or a tokenizer.json")
    pair.add_argument("--teacher", required=True, help="tokenizer: a Hub id, a folder or a tokenizer.json")

    audit = commands.add_parser("audit", parents=[pair], help="which tokens keep a partner, and which loss to use")
    audit.add_argument("--critical", help="class name or regular expression of the tokens that must survive")
    audit.add_argument("--json", action="store_true", help="print JSON instead of a table")

    show = commands.add_parser("show", parents=[pair], help="print a text in both tokenizations, chunk above chunk")
    show.add_argument("text")
    show.add_argument("--method", default="auto", help="alignment method (default %(default)s)")
    show.add_argument("--json", action="store_true", help="print JSON instead of coloured lines")

    project = commands.add_parser("project", parents=[pair], help="build the projection matrix W and write it")
    project.add_argument("--output", required=True, help="file to write (safetensors)")
    project.add_argument("--top-k", type=int, default=4, help="most entries of a row (default %(default)s)")
    project.add_argument("--beta", type=float, default=0.9, help="weight of the first piece (default %(default)s)")
    project.add_argument("--gamma", type=float, default=0.1, help="factor from piece to piece (default %(default)s)")
    project.add_argument("--reverse", action="store_true", help="also reach teacher tokens that nothing else reaches")

    demo = commands.add_parser("demo", help="distil a real teacher into a small student, on the CPU in minutes")
    demo.add_argument("--steps", type=int, help="training steps of each student")
    demo.add_argument("--seed", type=int, default=0, help="seed of everything random (default %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"xtoken {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _show(options: argparse.Namespace) -> str:
    from .alignment import Aligner

    aligner = Aligner(options.student, options.teacher, options.method)
    student_ids, teacher_ids = (
        vocabulary.tokenizer.encode(options.text, add_special_tokens=False).ids
        for vocabulary in (aligner.student, aligner.teacher)
    )
    alignment = aligner.align(student_ids, teacher_ids)
    if not options.json:
        width = shutil.get_terminal_size().columns
        return alignment.pretty(aligner.student, aligner.teacher, color=sys.stdout.isatty(), width=width)
    facts = {
        "student_ids": student_ids,
        "teacher_ids": teacher_ids,
        "student_tokens": [aligner.student[i].decode("utf-8", "backslashreplace") for i in student_ids],
        "teacher_tokens": [aligner.teacher[i].decode("utf-8", "backslashreplace") for i in teacher_ids],
        "spans": alignment.spans.tolist(),
    }
    return json.dumps(facts, ensure_ascii=False)


def _run(options: argparse.Namespace) -> None:
    if options.command == "config":
        from .config import show_config

        show_config()
    elif options.command == "audit":
        from .audit import NUMERALS, coverage_audit

        report = coverage_audit(options.student, options.teacher, critical=options.critical or NUMERALS)
        print(report.to_json() if options.json else report)
    elif options.command == "show":
        print(_show(options))
    elif options.command == "project":
        from .projection import ProjectionMatrix

        matrix = ProjectionMatrix.build(
            options.student, options.teacher, options.top_k, options.beta, options.gamma, options.reverse
        )
        matrix.save(options.output)
        print(f"{options.output}: {matrix}")
    elif options.command == "demo":
        from . import demo

        demo.run(**{"seed": options.seed, **({"steps": options.steps} if options.steps else {})})
