"""Which devices the CUDA kernels run on: what `auto` takes for older ones, and that launches reach the right one."""

from __future__ import annotations

from typing import Any

import emulated
import pytest
import torch
from default_losses import default_loss
from fake_device import DEVICE, fake_device
from harness import make_case

from xtoken import config, select_backend
from xtoken.losses import Needs, backends
from xtoken.losses.cuda import Kernels, why_not
from xtoken.losses.cuda import backend as cuda_backend

needs_emulator = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))


@pytest.mark.parametrize(
    ("capability", "driver", "reason"),
    [
        (80, 13000, None),
        (86, 13000, None),
        (90, 13000, None),
        (90, 13020, None),
        (90, 14000, None),
        (75, 13000, "kernels are for compute capability 8.0 and later, and the device has 7.5"),
        (90, 12090, "kernels need a driver for CUDA 13, and that here is for 12.9"),
        (90, 0, "kernels need a driver for CUDA 13, and that here is for 0.0"),
        (110, 13000, None),  # by the PTX
        (100, 13010, None),
    ],
)
def test_which_devices_can_run_the_kernels(capability: int, driver: int, reason: str | None) -> None:
    assert why_not(capability, driver, "80,90", 13000) == reason


def test_an_older_driver_runs_machine_code_but_translates_no_ptx() -> None:
    assert why_not(90, 13000, "80,90", 13020) is None
    assert why_not(86, 13000, "80,90", 13020) is None
    reason = "there is no machine code for compute capability 11.0, and a driver for CUDA 13.0 cannot translate the PTX"
    assert str(why_not(110, 13000, "80,90", 13020)).startswith(reason)
    assert why_not(80, 13000, "80,90", 13020) is None
    assert (
        why_not(87, 13000, "89,90", 13020) == "kernels are for compute capability 8.9 and later, and the device has 8.7"
    )


class Asked:
    """Launchers that know a driver and a device, and count how often they are asked."""

    architectures, cuda_version = "80,90,100,120", 13000

    def __init__(self, capability: int, driver: int = 13000) -> None:
        self.capability, self.driver, self.asked = capability, driver, 0

    def compute_capability(self, device: int) -> int:
        self.asked += 1
        if device == 3:
            raise RuntimeError("device: invalid device ordinal")
        return self.capability

    def driver_version(self) -> int:
        return self.driver


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Registers a backend "cuda" of such launchers."""

    def register(asked: Asked) -> Asked:
        one = cuda_backend("cuda", Kernels(asked, emulated.memory()), "cuda")
        monkeypatch.setitem(backends._BACKENDS, "cuda", one)
        return asked

    monkeypatch.setattr(backends._warn_once, "said", set())
    return register


def test_auto_takes_the_reference_on_an_older_gpu_and_says_why(
    with_cuda: Any, recwarn: pytest.WarningsRecorder
) -> None:
    asked = with_cuda(Asked(75))
    reason = "kernels are for compute capability 8.0 and later, and the device has 7.5"
    for _ in range(3):
        assert select_backend("auto", "cuda:0") == "reference"
    assert asked.asked == 1
    assert [str(one.message) for one in recwarn] == [
        f"losses on cuda:0 are computed in plain PyTorch, since backend 'cuda' cannot: {reason}"
    ]
    with pytest.raises(RuntimeError, match=f"backend: 'cuda' is not available: {reason}"):
        select_backend("cuda", "cuda:0")


def test_auto_takes_the_kernels_where_they_run(with_cuda: Any, recwarn: pytest.WarningsRecorder) -> None:
    with_cuda(Asked(86))
    assert select_backend("auto", "cuda:0") == "cuda"
    assert select_backend("auto", "cuda:3") == "reference"
    assert str(recwarn.pop().message).endswith("cannot: CUDA does not answer: device: invalid device ordinal")
    assert not recwarn.list


def test_a_build_without_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(backends._BACKENDS, "cuda", raising=False)
    monkeypatch.setattr(backends._warn_once, "said", set())
    with pytest.warns(UserWarning, match="since backend 'cuda' cannot: this build of xtoken has no CUDA kernels"):
        assert select_backend("auto", "cuda:0") == "reference"


def test_the_configuration_says_which_devices_can(with_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with_cuda(Asked(75))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    shown = type("Properties", (), {"name": "Tesla T4", "major": 7, "minor": 5})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: shown)
    assert config.config()["CUDA devices"] == (
        "cuda:0 Tesla T4 (7.5), backend reference, since kernels are for compute capability 8.0 and later, and the "
        "device has 7.5"
    )


@needs_emulator
def test_launches_reach_the_device_of_the_tensors() -> None:
    """The launchers' own runtime is told the device, and has the one from before afterwards."""
    case, loss = make_case(), default_loss(Needs.PROJECTION)
    emulator = emulated.load()[1]
    with fake_device():
        student, teacher = (one.float().to(DEVICE) for one in (case.student, case.teacher))
        loss(student.requires_grad_(), teacher, case.alignment, case.projection).backward()
    assert emulator.devices() == (0, DEVICE.index)
    loss(case.student.float(), case.teacher.float(), case.alignment, case.projection, backend="emulated")
    assert emulator.devices() == (0, 0)
    module = emulated.load()[0]
    with pytest.raises(RuntimeError, match="device: invalid device ordinal"):
        module.launch("scale", {}, 1, 32, 0, 99)


@needs_emulator
def test_the_launchers_tell_what_the_machine_has() -> None:
    module, emulator = emulated.load()
    try:
        emulator.set_machine(capability=75, driver=11040)
        assert (module.compute_capability(1), module.driver_version()) == (75, 11040)
        kernels = Kernels(module, emulated.memory())
        assert kernels.why_not(0) == "kernels are for compute capability 8.0 and later, and the device has 7.5"
    finally:
        emulator.set_machine()
    assert Kernels(module, emulated.memory()).why_not(0) is None
    assert "invalid device ordinal" in str(Kernels(module, emulated.memory()).why_not(99))
