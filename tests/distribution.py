"""`make dist`: sdist and wheel of what git tracks, what is in them, and tests of the wheel where it is installed alone.

python tests/distribution.py FOLDER      all of it; FOLDER then holds the sdist, the wheel and the environment
python tests/distribution.py installed   the tests alone, on the xtoken of this interpreter
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

NOT_IN_SDIST = re.compile(r"^(\.|bench/results/.*\.png$)")
"""Tracked files that neither a build nor a test needs: those of editors, of git and of CI, and pictures."""

OF_SETUPTOOLS = re.compile(r"^(PKG-INFO|setup\.cfg|xtoken\.egg-info/.*)$")

TESTS = [
    "test_align_dp.py", "test_alignment.py", "test_data.py", "test_notebook.py", "test_pieces.py",
    "test_projection.py", "test_storage.py", "test_teacher_cache.py", "test_vocabulary.py", "losses/test_backends.py",
    "losses/test_kd.py", "losses/test_pkl.py", "losses/test_prefix_kl.py", "losses/test_ranked.py",
]  # fmt: skip
"""What needs neither an extra nor the sources, of every layer: files, alignment, projection, losses."""


def run(*command: str | Path, folder: Path | None = None) -> None:
    # Nothing of the caller's environment leads to another xtoken.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([str(part) for part in command], cwd=folder, env=environment, check=True)


def build(source: Path, target: Path) -> None:
    """The sdist, and the wheel from the sdist, each in an environment that pip makes for it."""
    command = [sys.executable, "-m", "build", "--outdir", str(target), str(source)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(done.stdout)
    print("\n".join(line for line in done.stdout.splitlines() if line.startswith("xtoken: ")))


def differences(kind: str, expected: set[str], found: set[str]) -> list[str]:
    """What an archive lacks, and what it has that it should not."""
    lacking = [f"{kind} lacks {name}" for name in sorted(expected - found)]
    return lacking + [f"{kind} has {name}, which it should not" for name in sorted(found - expected)]


def wrong_with_sdist(names: set[str], tracked: set[str]) -> list[str]:
    """Of the names of its files, without its own folder: each is tracked, and none is missing."""
    made = {name for name in names if OF_SETUPTOOLS.match(name)}
    return differences("the sdist", {name for name in tracked if not NOT_IN_SDIST.match(name)}, names - made)


def wrong_with_wheel(names: set[str], tracked: set[str]) -> list[str]:
    """The package as it is tracked (stubs, templates, py.typed), the compiled modules, licence and metadata."""
    modules = {name for name in names if re.fullmatch(r"xtoken/_(core|cuda)\.[\w-]+\.(so|pyd)", name)}
    package = {name for name in tracked if name.startswith("xtoken/")}
    about = {name for name in names if re.match(r"xtoken-[\w.]+\.dist-info/", name)}
    wrong = differences("the wheel", package, names - modules - about)
    if not any("/_core." in name for name in modules):
        wrong.append("the wheel lacks xtoken/_core")
    if not any(name.endswith("/licenses/LICENSE") for name in about):
        wrong.append("the wheel lacks the licence")
    return wrong


def wrong_with_metadata(text: str) -> list[str]:
    """By the specification (PEP 566 and its successors), the list of classifiers, and what users look for."""
    from packaging.metadata import ExceptionGroup, InvalidMetadata, Metadata
    from trove_classifiers import classifiers

    try:
        metadata = Metadata.from_email(text, validate=True)
    except (ExceptionGroup, InvalidMetadata) as error:
        return [f"metadata: {one}" for one in getattr(error, "exceptions", [error])]
    wrong = [f"metadata: no classifier {name!r}" for name in metadata.classifiers or [] if name not in classifiers]
    if metadata.license_expression != "Apache-2.0":
        wrong.append(f"metadata: license expression {metadata.license_expression!r}")
    if metadata.description_content_type != "text/markdown" or "# xtoken" not in (metadata.description or ""):
        wrong.append("metadata: the description is not the README")
    return wrong


def test_installed() -> None:
    """Runs `TESTS` and a part of the self test in a folder that has the tests, and no xtoken."""
    python = Path(sys.executable)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        print_place = (
            "import pathlib, sys, sysconfig, importlib.util\n"
            "place = pathlib.Path(importlib.util.find_spec('xtoken').origin).parent\n"
            "assert place.parent.samefile(sysconfig.get_path('platlib')), place\n"
            "sys.path.insert(0, str(place))\n"
            "import _core\n"
            "assert 'torch' not in sys.modules, 'the core imported torch'\n"
            "print('xtoken', _core.version, _core.compiler, 'in', place)\n"
            "if list(place.glob('_cuda.*.so')):\n"
            "    import _cuda\n"
            "    print('CUDA kernels for', _cuda.architectures)\n"
        )
        run(python, "-I", "-c", print_place, folder=folder)
        tests = [f"tests/{name}" for name in TESTS]
        run(python, "-I", "-m", "pytest", "-q", "--quick", "--no-tokenizers", *tests, folder=folder)
        run(python, "-I", "-m", "xtoken", "config", folder=folder)
        run(python, "-I", "-m", "xtoken", "check", "--device", "cpu", folder=folder)


def main(target: Path) -> None:
    tracked = set(subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
                  .stdout.decode().split("\0")) - {""}  # fmt: skip
    source = target / "source"
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    build(source, target)
    [sdist], [wheel] = target.glob("xtoken-*.tar.gz"), target.glob("xtoken-*.whl")
    with tarfile.open(sdist) as archive:
        names = {one.name.partition("/")[2] for one in archive if one.isfile()}
    wrong = wrong_with_sdist(names, tracked)
    with zipfile.ZipFile(wheel) as archive_of_wheel:
        of_wheel = {name for name in archive_of_wheel.namelist() if not name.endswith("/")}
        [metadata] = [name for name in of_wheel if name.endswith(".dist-info/METADATA")]
        text = archive_of_wheel.read(metadata).decode()
    wrong += wrong_with_wheel(of_wheel, tracked) + wrong_with_metadata(text)
    if wrong:
        raise SystemExit("\n".join(wrong))
    print(f"{sdist.name}: {len(names)} files, {sdist.stat().st_size:,} bytes")
    print(f"{wheel.name}: {len(of_wheel)} files, {wheel.stat().st_size:,} bytes")

    [torch] = re.findall(r"^torch==\S+", (ROOT / "requirements/dev.txt").read_text(), re.MULTILINE)
    subprocess.run([sys.executable, "-m", "venv", target / "venv"], check=True)
    pip = [target / "venv/bin/python", "-m", "pip", "--quiet"]
    run(*pip, "install", torch, wheel, "pytest", "hypothesis")
    run(*pip, "check")
    begin = time.monotonic()
    run(*pip, "install", "--force-reinstall", "--no-deps", wheel)
    print(f"installed in {time.monotonic() - begin:.1f} s, what it needs being there")
    run(target / "venv/bin/python", source / "tests/distribution.py", "installed")


if __name__ == "__main__":
    if sys.argv[1:] == ["installed"]:
        test_installed()
    else:
        main(Path(sys.argv[1]).resolve())
