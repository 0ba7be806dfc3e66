"""What this build of xtoken is and what it can use on this machine."""

from __future__ import annotations

import importlib
import platform

from . import _core
from .losses.backends import backend_names, why_not
from .losses.cuda import version


def config() -> dict[str, str]:
    """Facts about the build and the machine, in words."""
    import tokenizers
    import torch
    import transformers

    return {
        "xtoken": _core.version,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "compiler": f"{_core.compiler}, {_core.build_type} build",
        "processors": str(_core.available_processors()),
        "instruction sets": ", ".join(_core.cpu_features()) or "none beyond the baseline",
        "CPU kernels": f"{_core.cpu_level()} (can run: {', '.join(_core.cpu_levels())})",
        "CUDA kernels": _cuda_kernels(),
        "CUDA devices": _cuda_devices(),
        "loss backends": ", ".join(backend_names()),
    }


def _cuda_kernels() -> str:
    """Architectures that the CUDA kernels are built for, or why there are none."""
    try:
        _cuda = importlib.import_module("xtoken._cuda")
    except ModuleNotFoundError:
        return "not built (XTOKEN_CUDA=1 pip install builds them); losses on CUDA tensors use the reference backend"
    except ImportError as error:
        return f"built, but they do not load: {error}"
    architectures = _cuda.architectures.split(",")
    built = version(_cuda.cuda_version)
    return f"sm_{', sm_'.join(architectures)}; PTX of {architectures[0]} for others (CUDA {built})"


def _cuda_devices() -> str:
    """Each device, and which backend losses have there, with the reason if it is not that of CUDA."""
    import torch

    if not torch.cuda.is_available():
        return "none found" if torch.version.cuda else "none: this torch is built without CUDA"
    found = []
    for number in range(torch.cuda.device_count()):
        device, properties = torch.device("cuda", number), torch.cuda.get_device_properties(number)
        reason = why_not("cuda", device)
        backend = "backend cuda" if reason is None else f"backend reference, since {reason}"
        found.append(f"{device} {properties.name} ({properties.major}.{properties.minor}), {backend}")
    return "; ".join(found)


def show_config() -> None:
    """Prints version, compiler, instruction sets, and whether CUDA is there and why not."""
    facts = config()
    for name, value in facts.items():
        print(f"{name:<{max(map(len, facts))}}  {value}")
