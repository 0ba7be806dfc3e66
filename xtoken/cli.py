"""The command ``xtoken``. What a command needs is imported when it runs, so that help is there at once."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from . import _core, outputs
from .remote import is_url
from .terminal import (
    PrintableLog,
    did_you_mean,
    flush_output,
    is_terminal,
    one_line,
    print_traceback,
    printable,
    to_json,
    working,
)

METHODS = tuple(method.name for method in _core.AlignMethod)
FILES = "parquet, jsonl, txt, arrow; globs"
TOKENIZER = "a Hub id, a folder, tokenizer.json, tekken.json, tiktoken ranks, a SentencePiece model or GGUF"
RENAMED = {("project", "--top-k"): "--row-entries", ("cache-teacher", "--top-k"): "--logprobs"}
"""Options that have another name now: ``--top-k`` is the columns of a loss, in ``xtoken train``."""


class Command(TyperCommand):
    """A command in which an option that may be repeated also takes several values at once, as those of a glob."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {name for one in self.params if getattr(one, "multiple", False) for name in one.opts}
        spread: list[str] = []
        option = None
        for word in args:
            name = word.partition("=")[0]
            if (command := (str(self.name), name)) in RENAMED:
                raise typer.BadParameter(f"{name} is {RENAMED[command]} now", ctx)
            if word.startswith("-") and (option is None or spread[-1] != option):
                option = name if name in several else None
            elif option is not None and spread[-1] != option:
                spread.append(option)
            spread.append(word)
        return super().parse_args(ctx, spread)


app = typer.Typer(
    name="xtoken",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _command(example: str, **settings: Any) -> Callable[[Any], Any]:
    return app.command(cls=Command, epilog=f"Example: xtoken {example}", **settings)


def _one_of(known: Sequence[str], help: str) -> Any:
    """An option with few values, which are completed, and checked before anything else is done."""

    def check(value: str) -> str:
        if value not in known:
            raise typer.BadParameter(f"expected one of {', '.join(known)}, got {value!r}{did_you_mean(value, known)}")
        return value

    def complete(incomplete: str) -> list[str]:
        return [one for one in known if one.startswith(incomplete)]

    return typer.Option(metavar="{" + ",".join(known) + "}", help=help, callback=check, autocompletion=complete)


def _version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"xtoken {_core.version}")
        raise typer.Exit


Student = Annotated[str, typer.Option(metavar="TOKENIZER", help=f"tokenizer: {TOKENIZER}")]
Teacher = Annotated[str, typer.Option(metavar="TOKENIZER", help="tokenizer, likewise")]
MaybeStudent = Annotated[str | None, typer.Option(metavar="TOKENIZER", help=f"tokenizer: {TOKENIZER}")]
MaybeTeacher = Annotated[str | None, typer.Option(metavar="TOKENIZER", help="tokenizer, likewise")]
Weights = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE...", help=f"count tokens as often as they occur at the beginnings of these; {FILES}"),
]
OutputFile = Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="file to write (safetensors)")]
OutputFolder = Annotated[str, typer.Option("--output", "-o", metavar="FOLDER", help="folder to write to")]
TextColumn = Annotated[str, typer.Option(help="column or field with the text")]
Resume = Annotated[bool, typer.Option("--resume", help="go on with a run that was stopped")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document, and nothing else, to standard output")]


@app.callback()
def _xtoken(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="before the command: show where an error comes from")] = False,
) -> None:
    """Distillation of language models across tokenizers."""


# --- tokenizers


@_command("audit --student meta-llama/Llama-3.2-1B --teacher Qwen/Qwen3-4B --data corpus.jsonl")
def audit(
    student: Student,
    teacher: Teacher,
    critical: Annotated[
        str | None,
        typer.Option(help="class name or regular expression of the tokens that must survive (default: numbers)"),
    ] = None,
    data: Weights = None,
    json: Json = False,
) -> None:
    """Say which tokens keep a partner, and which loss to use."""
    _check_inputs(student, teacher, data)
    from .audit import NUMERALS, choose_loss, coverage_audit, critical_classes, same_tokens
    from .pieces import PieceIndex

    wanted = critical_classes(critical or NUMERALS)
    with working("reading the tokenizers") as say:
        sides = _vocabularies(student, teacher)
        say("counting the tokens that keep a partner")
        report = coverage_audit(*sides, critical=wanted, corpus=_corpus(data))
        say("comparing the tokenizers")
        pieces = None if same_tokens(*sides) else PieceIndex.build(*sides)
        choice = choose_loss(*sides, report=report, pieces=pieces)
    print(choice.to_json() if json else choice)


@_command("show --student meta-llama/Llama-3.2-1B --teacher Qwen/Qwen3-4B 'In 1995, 1,024 readers'")
def show(
    text: str,
    student: Student,
    teacher: Teacher,
    method: Annotated[str, _one_of(METHODS, "alignment method")] = "auto",
    json: Json = False,
) -> None:
    """Print a text in both tokenizations, chunk above chunk."""
    _check_utf8("text", text)
    _check_inputs(student, teacher)
    from .alignment import Aligner
    from .vocabulary.long_texts import encode_texts

    with working("reading the tokenizers"):
        aligner = Aligner(*_vocabularies(student, teacher), method)
        sides = {"student": aligner.student, "teacher": aligner.teacher}
        ids = {name: list(map(int, encode_texts(side.tokenizer, [text])[0])) for name, side in sides.items()}
        alignment = aligner.align(*ids.values())
    facts: dict[str, Any] = {f"{name}_ids": ids[name] for name in sides}
    for name, side in sides.items():
        facts[f"{name}_tokens"] = [side[i].decode("utf-8", "backslashreplace") for i in ids[name]]
    width = shutil.get_terminal_size().columns
    drawn = alignment.pretty(*sides.values(), color=is_terminal(sys.stdout), width=width)
    print(to_json({**facts, "spans": alignment.spans.tolist()}) if json else drawn)


@_command("project --student meta-llama/Llama-3.2-1B --teacher Qwen/Qwen3-4B --output w.safetensors")
def project(
    student: Student,
    teacher: Teacher,
    output: OutputFile,
    row_entries: Annotated[int, typer.Option(min=1, max=1024, help="most entries of a row")] = 4,
    beta: Annotated[float, typer.Option(help="weight of the first piece")] = 0.9,
    gamma: Annotated[float, typer.Option(help="factor from piece to piece")] = 0.1,
    reverse: Annotated[bool, typer.Option("--reverse", help="also reach tokens that nothing else reaches")] = False,
    pieces: Annotated[bool, typer.Option("--pieces", help="build the piece index, in place of W")] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", "--texts", metavar="FILE...",
            help=f"with --pieces: also learn from about 1 MB of these which events the tokenizers confuse; {FILES}",
        ),
    ] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Build the projection matrix W, or the piece index, and write it."""
    if data and not pieces:
        raise ValueError("--data: expected --pieces with it, since W learns from no text")
    usual = inspect.signature(project).parameters
    for name, value in {"row_entries": row_entries, "beta": beta, "gamma": gamma, "reverse": reverse}.items():
        if pieces and value != usual[name].default:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option}: expected no --pieces with it, since a piece index has no weights")
    outputs.check_file(output)
    _check_inputs(student, teacher, data, output)
    from .pieces import PieceIndex
    from .projection import ProjectionMatrix
    from .sample import sample_texts

    built: Any
    with working("reading the tokenizers") as say:
        sides = _vocabularies(student, teacher)
        if pieces:
            say("building the piece index")
            built = PieceIndex.build(*sides, texts=[*sample_texts(*sides), *(_corpus(data) or [])])
        else:
            say("building W")
            built = ProjectionMatrix.build(*sides, row_entries, beta, gamma, reverse)
        built.save(output)
    said = f"{built}\n{built.merged()}" if pieces else f"{built}"
    facts = {"events": built.events, "merged": asdict(built.merged())} if pieces else {"entries": built.nnz}
    _tell(json, {"output": output, "shape": list(built.shape), **facts}, f"{printable(output)}: {said}")


# --- corpora


@_command("align --student meta-llama/Llama-3.2-1B --teacher Qwen/Qwen3-4B --data 'corpus/*.jsonl' --output aligned")
def align(
    student: Student,
    teacher: Teacher,
    data: Annotated[list[str], typer.Option("--data", "--input", metavar="FILE...", help=FILES)],
    output: OutputFolder,
    text_column: TextColumn = "text",
    max_length: Annotated[
        int | None, typer.Option(help="cut documents where both sides fit into so many tokens")
    ] = None,
    method: Annotated[str, _one_of(METHODS, "alignment method")] = "auto",
    engine: Annotated[str, _one_of(("local", "ray"), "where the shards are made")] = "local",
    workers: Annotated[
        int | None, typer.Option(help="processes (default: 1 with local, which uses all processors)")
    ] = None,
    resume: Resume = False,
    on_error: Annotated[str, _one_of(("raise", "skip"), "what to do about broken lines")] = "raise",
    shard_bytes: Annotated[int, typer.Option(help="input bytes a shard")] = 64 << 20,
    json: Json = False,
) -> None:
    """Align a corpus and write parquet shards."""
    outputs.check_folder(output, urls=True)
    _check_inputs(student, teacher, data, "" if is_url(output) else output)
    from .corpus import Options, require

    options = Options(text_column, max_length, method, engine, workers, resume, on_error, shard_bytes)
    require("pyarrow", "corpus")
    from .corpus.run import run

    with contextlib.redirect_stdout(sys.stderr):  # Ray prints of workers that died
        manifest = run(student, teacher, data, output, options, "--data")
    total, shards = manifest.total, len(manifest.shards)
    skipped = sum(total.skipped.values())
    said = (
        f"{printable(output)}: {total.documents} documents in {shards} shards, {total.student_tokens} student and "
        f"{total.teacher_tokens} teacher tokens in {total.chunks} chunks"
    )
    said += f"; {skipped} broken documents left out" if skipped else ""
    _tell(json, {"output": output, "shards": shards, **vars(total)}, said)


@_command("cache-teacher --teacher Qwen/Qwen3-4B --data corpus.jsonl --output cache --logprobs 64")
def cache_teacher(
    teacher: Annotated[str, typer.Option(metavar="MODEL", help="a folder, a Hub id or a GGUF file")],
    data: Annotated[list[str], typer.Option(metavar="FILE...", help="files as for xtoken train; globs")],
    output: OutputFolder,
    url: Annotated[
        str | None,
        typer.Option(
            help="server of vLLM or SGLang that has it by that name, http://host:port/v1, in place of running it here; "
            "its key is $XTOKEN_TEACHER_KEY"
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="with --url: tokenizer of a teacher whose name only the server knows")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="requests to it in flight")] = 16,
    timeout: Annotated[float, typer.Option(min=0.001, help="seconds for an answer")] = 600.0,
    patience: Annotated[float, typer.Option(min=0, help="seconds to try again after errors")] = 300.0,
    logprobs: Annotated[int, typer.Option(min=1, help="of each token the largest")] = 128,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="tokens of a document (default: as many as the model can take)")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="tokens at a time")] = 4096,
    text_column: TextColumn = "text",
    chat_template: Annotated[
        str | None, typer.Option(help="for a tokenizer that has none: a file with a chat template, or its text")
    ] = None,
    teacher_system: Annotated[
        str | None, typer.Option(help="what the teacher alone is told, as --teacher_system of xtoken train")
    ] = None,
    dtype: Annotated[str, typer.Option(help="type of the weights; auto: as stored")] = "auto",
    quantization: Annotated[
        str | None, typer.Option(help="weights in 8 or 4 bits, as --teacher_quantization of xtoken train")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="where the model runs (default: cuda if there is one, else cpu)")
    ] = None,
    resume: Resume = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run code that comes with the model")
    ] = False,
    json: Json = False,
) -> None:
    """Run a teacher once and keep its log-probabilities."""
    options = {name: value for name, value in locals().items() if name != "json"}
    outputs.check_folder(output)
    outputs.check_apart(output, [teacher, *([tokenizer] if tokenizer else [])])
    from .train import cached

    _hide_progress()
    cache = cached.main(**options)
    facts = {"output": output, "documents": len(cache), "logprobs": cache.top_k}
    _tell(json, facts, f"{printable(output)}: {facts['documents']} documents, {cache.top_k} log-probabilities a token")


# --- training


def _help_of_train(is_wanted: bool) -> None:
    if is_wanted:
        print((Path(__file__).parent / "train" / "help.txt").read_text(encoding="utf-8"), end="")
        raise typer.Exit


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
)
def train(
    ctx: typer.Context,
    help: Annotated[bool, typer.Option("--help", "-h", is_eager=True, callback=_help_of_train)] = False,
    json: Json = False,
) -> None:
    """Distil from teachers into a student."""
    with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
        from .train import command

        _hide_progress()
        facts = command.main(ctx.args)
    if json and facts is not None:
        print(to_json(facts))


@_command("report --student meta-llama/Llama-3.2-1B --teacher Qwen/Qwen3-4B --output report.html")
def report(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="output folder of xtoken train; else a pair is meant")
    ] = None,
    student: MaybeStudent = None,
    teacher: MaybeTeacher = None,
    text: Annotated[
        list[str] | None, typer.Option(metavar="TEXT...", help="texts to show in both tokenizations")
    ] = None,
    data: Weights = None,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="file to write")] = "report.html",
    json: Json = False,
) -> None:
    """Write a page about a pair of tokenizers, or about a training run."""
    if run is not None and (student or teacher):
        raise ValueError(f"report: expected --student and --teacher or a RUN, got both, with {run!r} as RUN")
    if run is None and student is None and teacher is None:
        raise ValueError("report: expected --student and --teacher, or the folder of a training run")
    if run is not None and (text or data):
        raise ValueError("--text, --data: expected --student and --teacher with them")
    outputs.check_file(output)
    _check_utf8("--text", *(text or ()))
    if run is None and (student is None or teacher is None):
        raise ValueError(f"--{'student' if student is None else 'teacher'}: expected one")
    _check_inputs(student, teacher, data, output)
    if run is not None:
        outputs.check_apart(output, [run])
    from .report import pair_report, run_report

    page: Any
    with working("reading") as say:
        if student is None or teacher is None:
            page = run_report(str(run))
        else:
            sides = _vocabularies(student, teacher)
            say("comparing the tokenizers")
            of_student, of_teacher = (
                printable(Path(one).name if Path(one).exists() else one) for one in (student, teacher)
            )
            page = pair_report(*sides, names=(of_student, of_teacher), texts=text or [], corpus=_corpus(data))
        say("writing the page")
        page.save(output)
    _tell(json, {"output": output, "page": str(page)}, f"{printable(output)}: {page}")


# --- this machine


@_command("check --device cuda:0")
def check(
    device: Annotated[str | None, typer.Option(help="such as cuda:1 or cpu (default: the GPU if there is one)")] = None,
    losses: Annotated[list[str] | None, typer.Option(metavar="LOSS...", help="default: all")] = None,
    rows: Annotated[
        int | None, typer.Option(help="of logits; fewer take less memory (default: 64, on the CPU 8)")
    ] = None,
    json: Json = False,
) -> None:
    """Compare every loss with float64 on this machine, and time it."""
    from .check import self_test
    from .losses import registered

    known = list(registered())
    for name in losses or ():
        if name not in known:
            said = f"expected some of {', '.join(known)}, got {name!r}{did_you_mean(name, known)}"
            raise typer.BadParameter(said, param_hint="--losses")
    with working("comparing") if json else contextlib.nullcontext(functools.partial(print, flush=True)) as tell:
        found = self_test(device, losses or None, rows=rows, tell=tell)
    if json:
        print(found.to_json())
    if not found.passed:
        raise typer.Exit(1)


@_command("demo --steps 20")
def demo(
    steps: Annotated[int, typer.Option(min=1, help="training steps of each student")] = 50,
    seed: Annotated[int, typer.Option(help="seed of everything random")] = 0,
    json: Json = False,
) -> None:
    """Distil a real teacher into a small student, on the CPU in minutes."""
    with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
        from .demo import run

        results = run(steps, seed)
    if json:
        print(to_json(results))


@_command("config --json")
def config(json: Json = False) -> None:
    """Print what this build can do on this machine."""
    from .config import config, show_config

    if json:
        print(to_json(config()))
    else:
        show_config()


def _tell(as_json: bool, facts: dict[str, Any], text: str) -> None:
    print(to_json(facts) if as_json else text)


def _check_inputs(
    student: str | None, teacher: str | None, data: Sequence[str] | None = None, output: str = ""
) -> None:
    """Raises OSError or ValueError for tokenizers and files that are not there, or are the output, before anything else
    is imported. Files at URLs take their time, and are looked for by what reads them."""
    from .vocabulary.sources import check_source

    given = {"--student": student, "--teacher": teacher}
    sources = {name: source for name, source in given.items() if source is not None}
    for name, source in sources.items():
        check_source(source, name)
    files = [one for one in data or () if not is_url(one)]
    if files:
        from .corpus.files import find_files

        files = [one.path for one in find_files(files, "--data")]
    outputs.check_apart(output, [*sources.values(), *files])


def _hide_progress() -> None:
    """Turns off the progress bars of transformers, and of what it imports, unless standard error is a terminal."""
    if not is_terminal(sys.stderr):
        import transformers

        transformers.utils.logging.disable_progress_bar()
        if datasets := sys.modules.get("datasets"):
            datasets.disable_progress_bars()


def _check_utf8(name: str, *texts: str) -> None:
    """Raises ValueError for words of the command line that are no UTF-8, which Python has as surrogates."""
    for text in texts:
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"{name}: expected UTF-8, got {text!r}")


def _vocabularies(student: str, teacher: str) -> tuple[Any, Any]:
    from .vocabulary import Vocabulary

    return Vocabulary.from_tokenizer(student), Vocabulary.from_tokenizer(teacher)


def _corpus(data: Sequence[str] | None) -> list[str] | None:
    """Texts from the beginnings of files; None without files."""
    if not data:
        return None
    from .train.data import text_sample

    found = text_sample(data)
    if not found:
        raise ValueError(f"--data: expected rows with text, messages or a prompt, got none in {', '.join(data)}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 1 for an error, 2 for words that are no command or option."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed; print would write errors to the other
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115
        if hasattr(getattr(sys, stream), "reconfigure"):  # not what a caller may have put there
            getattr(sys, stream).reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:  # which writes what no other handler takes
        logging.lastResort.setFormatter(PrintableLog())
    given = list(sys.argv[1:] if arguments is None else arguments)
    is_debugged = given[:1] == ["--debug"]
    command = given[is_debugged] if len(given) > is_debugged else ""
    name = "xtoken"
    try:
        if command in typer.main.get_group(app).commands:
            name = f"xtoken {command}"
        status = app(given, prog_name="xtoken", standalone_mode=False)
        flush_output()
    except KeyboardInterrupt:
        status = 130
    except SystemExit as end:  # of argparse
        return end.code if isinstance(end.code, int) else 1
    except Exception as error:
        with contextlib.suppress(OSError):
            flush_output()
        if hasattr(error, "format_message"):  # of typer, about the words that were given
            if said := one_line(error.format_message()):
                print(f"{name}: {said} ({name} --help)", file=sys.stderr)
            return 2
        if is_debugged:
            sys.excepthook = print_traceback
            raise
        is_ours = isinstance(error, (ValueError, TypeError, OSError, ImportError))
        said = str(error) if is_ours else f"{type(error).__name__}: {error} (xtoken --debug {command} says where)"
        print(f"{name}: {one_line(said)}", file=sys.stderr)
        return 1
    if status == 130:
        hint = "; what is complete stays, go on with --resume" if command in ("align", "cache-teacher", "train") else ""
        print(f"{name}: interrupted{hint}", file=sys.stderr)
    return status or 0
