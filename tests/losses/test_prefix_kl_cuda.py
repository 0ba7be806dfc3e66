"""The layout of a piece index for the CUDA kernels."""

import pytest
import torch
from harness import piece_index

from xtoken.losses.prefix_kl.cuda import prefix_plan_for
from xtoken.losses.sliced import WARP

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("sizes", [(67, 59), (1203, 1101)])
def test_the_plan_of_a_piece_index(sizes: tuple[int, int]) -> None:
    """Every token is in a pair or in the list of its event, once; the plan is kept until the index changes."""
    pieces = piece_index(*sizes)
    data = pieces.data.clone()
    plan = prefix_plan_for(data, data.device)
    paired = (plan.slot >= 0).nonzero()[:, 0]
    partner = plan.slot[paired].long()
    assert torch.equal(pieces.student.event[paired], pieces.teacher.event[partner])
    assert (plan.number[partner] == -1).all()
    events = []
    sides = zip(
        (plan.student_lists, plan.teacher_lists), (pieces.student, pieces.teacher), (paired, partner), strict=True
    )
    for lists, side, pairs in sides:
        found = []
        of_number = torch.full((plan.events + 1,), -1)
        numbers = list(range(plan.events))
        if side is pieces.student:
            numbers.insert(plan.unmatched, plan.events)
        else:
            numbers = plan.teacher_list.argsort().tolist()
        assert len(numbers) == len(lists.owner)
        for n, number in enumerate(numbers):
            piece = n if n < lists.shared else lists.shared + (n - lists.shared) // WARP
            block = lists.tokens[WARP * int(lists.start[piece]) : WARP * int(lists.start[piece + 1])]
            tokens = block if n < lists.shared else block.view(-1, WARP, 4)[:, (n - lists.shared) % WARP].flatten()
            tokens = tokens[tokens >= 0].long()
            found.append(tokens)
            if number < plan.events:
                (of_number[number],) = side.event[tokens].unique()
            assert ((-1 - plan.slot if side is pieces.student else plan.number)[tokens] == number).all()
        assert torch.equal(torch.cat([pairs, *found]).sort().values, torch.arange(len(side.event)))
        events.append(of_number[:-1])
    assert torch.equal(*events)
    assert prefix_plan_for(data, data.device) is plan
    data.add_(0)
    assert prefix_plan_for(data, data.device) is not plan
