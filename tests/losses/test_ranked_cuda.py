"""The sort around the CUDA kernels of pairs and ranks."""

import emulated
import pytest
import torch
from harness import OPERATIONS, make_case
from test_ranked import PAIRED

from xtoken.losses.ranked import cuda as ranked_cuda

pytestmark = pytest.mark.slow


@pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
@pytest.mark.parametrize("name", PAIRED)
def test_groups_of_chunks_do_not_change_the_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    results = []
    for elements in (ranked_cuda.SORTED_ELEMENTS, 1):
        monkeypatch.setattr(ranked_cuda, "SORTED_ELEMENTS", elements)
        student = case.student.float().requires_grad_()
        loss = OPERATIONS[name].public(case, student, case.teacher.float(), backend="emulated")
        results.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
