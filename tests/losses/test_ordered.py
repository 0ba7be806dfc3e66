"""Logits in a `TeacherOrder`: every loss is what it is in the tokenizer's order, and nothing can be mixed up."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from comparer import assert_close
from default_losses import DEFAULT
from fake_device import DEVICE, DeviceTensor, FakeDevice
from harness import OPERATIONS, PAIRS, Case, make_case, tokens
from old_versions import needs_what_a_graph_says
from torch import Tensor

import xtoken
from xtoken import (
    LinearLogits,
    OrderedLogits,
    PieceIndex,
    ProjectionMatrix,
    TeacherOrder,
    TopKLogits,
    Vocabulary,
    XTokenLoss,
)
from xtoken.alignment import Chunks
from xtoken.losses import Needs, registered
from xtoken.losses.cases import choices
from xtoken.losses.loss import Matrix
from xtoken.losses.on_pieces import OnPartners
from xtoken.losses.ordered import in_order, matrix_in
from xtoken.pieces import renumbered

SHARED = DEFAULT[Needs.SAME_TOKENIZER]
PROJECTED = DEFAULT[Needs.PROJECTION]
OF_CHUNKS = [name for name in registered() if name != SHARED]
BACKENDS_HERE = "reference", "cpu"
"""What differs is in front of all of them."""


def shuffled(size: int, seed: int = 3) -> TeacherOrder:
    return TeacherOrder(torch.randperm(size, generator=torch.Generator().manual_seed(seed)))


def order_of(name: str, case: Case) -> TeacherOrder:
    """The order that is made for the loss."""
    made: PieceIndex | ProjectionMatrix = case.pieces if registered()[name].needs is Needs.PIECES else case.projection
    return made.teacher_order()


def put(logits: Tensor, order: TeacherOrder) -> OrderedLogits:
    """The same logits in an order; columns beyond its tokens stay."""
    size = len(order)
    return OrderedLogits(torch.cat([logits[..., order.tokens], logits[..., size:]], -1), order)


def losses_and_gradient(name: str, case: Case, teacher: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    student = case.student.float().requires_grad_()
    labels = torch.arange(student[..., 0].numel()).view(student.shape[:2]) % case.projection.shape[0]
    loss, cross_entropy = OPERATIONS[name].public(case, student, teacher, labels=labels, **options)
    (gradient,) = torch.autograd.grad(loss + 0.7 * cross_entropy, student)
    return loss.detach(), cross_entropy.detach(), gradient


def assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, (x.double() for x in want), strict=True):
        assert_close(one, other, rtol=2e-5, atol=1e-6 * float(other.abs().max()))


def options_of(name: str) -> list[dict[str, Any]]:
    """The defaults, few columns, given columns, and what looks at realised tokens."""
    known = registered()[name].options()
    asked: list[dict[str, Any]] = [{}, OPERATIONS[name].few(7), {"columns": torch.tensor([40, 3, 8, 21])}]
    asked += [{"agree": True}, {"merge": "chain", "support": "reachable"}, {"merge": "mean"}]
    asked += [{"weighting": "teacher", "temperature": 2.0}]
    words = choices(registered()[name])
    return [
        one
        for k, one in enumerate(asked)
        if one.keys() <= known.keys() and (one or k == 0) and all(one[key] in words[key] for key in one.keys() & words)
    ]


@pytest.mark.parametrize(("name", "backend"), [one for one in PAIRS if one[0] != SHARED and one[1] in BACKENDS_HERE])
def test_every_loss_is_the_same(name: str, backend: str) -> None:
    """In any order, padded columns included; and in the one that is made for the loss."""
    case = make_case(samples=2)
    teacher = torch.nn.functional.pad(case.teacher.float(), (0, 3), value=9.0)
    for options in options_of(name):
        want = losses_and_gradient(name, case, teacher, backend=backend, **options)
        for order in (shuffled(case.projection.shape[1]), order_of(name, case)):
            assert_same(losses_and_gradient(name, case, put(teacher, order), backend=backend, **options), want)


@pytest.mark.parametrize("name", OF_CHUNKS)
def test_hidden_states_and_output_layer(name: str) -> None:
    case, order = make_case(), shuffled(59)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*case.teacher.shape[:2], 8, generator=generator)
    weight, bias = torch.randn(59, 8, generator=generator), torch.randn(59, generator=generator)
    want = losses_and_gradient(name, case, LinearLogits(hidden, weight, bias, softcap=4.0))
    layer = LinearLogits(hidden, weight[order.tokens], bias[order.tokens], softcap=4.0)
    assert_same(losses_and_gradient(name, case, OrderedLogits(layer, order)), want)


@pytest.mark.parametrize("name", OF_CHUNKS)
def test_what_the_criterion_reports(name: str) -> None:
    """Diagnostics, chunks that are not trusted and weights by certainty too; and W is given to losses without need."""
    case, order = make_case(), shuffled(59)
    student, labels = case.student.float(), torch.ones(case.student.shape[:2], dtype=torch.long)
    options = {"trust_top_k": 20}
    teachers = [OPERATIONS[name].teacher(case, **options)]
    if registered()[name].needs is Needs.NOTHING:
        teachers = [xtoken.Teacher(case.projection, name, **options)]
    criterion = XTokenLoss(teachers * 2, teacher_weighting="entropy")
    plain = case.teacher.float()
    rows = Chunks.of(case.alignment, *(side.shape[1] for side in (student, plain)))
    p = student.flatten(0, 1)[rows.student.start].softmax(-1)  # the teacher agrees in most chunks
    masses = xtoken.reference.project(p, xtoken.reference.restrict(case.projection, torch.arange(59)), 59)
    plain.flatten(0, 1)[rows.teacher.start[2:]] = masses[2:].clamp_min(1e-9).log()
    found = []
    for given in (plain, put(plain, order)):
        leaf = student.clone().requires_grad_()
        total, parts = criterion(leaf, labels, [given, plain.flip(1)], [case.alignment] * 2)
        total.backward()
        assert leaf.grad is not None
        found.append((total.detach(), leaf.grad, *(parts[key].nan_to_num(-1.0) for key in sorted(parts))))
        if issubclass(registered()[name], OnPartners):  # W, by which they agree, says nothing of shared tokens
            assert 0.1 < float(parts["mass"][0]) < 0.9
        else:
            assert float(parts["agreement"][0]) > 0.2
    assert_same(found[1], found[0])


def test_weights_that_are_trained_get_their_gradient() -> None:
    case, order = make_case(), shuffled(59)
    student, gradients = case.student.float(), []
    for given in (case.teacher.float(), put(case.teacher.float(), order)):
        W = case.projection.learnable()
        for _ in range(2):  # the second time what is kept of W is used again
            W.logits.grad = None
            OPERATIONS[PROJECTED].function()(student, given, case.alignment, W).backward()
        assert W.logits.grad is not None
        gradients.append(W.logits.grad)
    assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6 * float(gradients[0].abs().max()))
    assert float(gradients[0].abs().max()) > 0


def test_changes_of_the_matrix_are_seen() -> None:
    case, order = make_case(), shuffled(59)
    teacher = case.teacher.float()
    want, got = (losses_and_gradient(PROJECTED, case, one) for one in (teacher, put(teacher, order)))
    assert_same(got, want)
    case.projection.weight.numpy()[::2] *= 0.5
    got, changed = (losses_and_gradient(PROJECTED, case, one) for one in (put(teacher, order), teacher))
    assert_same(got, changed)
    assert not torch.equal(changed[0], want[0])


def test_an_alignment_on_a_device() -> None:
    """Whose ids are there with it, in one tensor; after the first step nothing waits, and nothing is copied."""
    case, order = make_case(), shuffled(59)
    loss = OPERATIONS[DEFAULT[Needs.PIECES]].teacher(case).make_loss()
    lengths = case.student.shape[1], case.teacher.shape[1]
    with FakeDevice() as device:
        given = OrderedLogits(case.teacher.to(DEVICE), order)
        alignment = case.alignment.to(DEVICE)
        in_order(loss, given, alignment)
        device.waits.clear()
        device.copies.clear()
        _, logits, numbered = in_order(loss, given, alignment)
        assert (device.waits, device.copies, logits) == ([], [], given.logits)
        assert numbered is not None
        chunks = Chunks.of(numbered, *lengths, DEVICE, realised=True)
    want = Chunks.of(case.alignment, *lengths, realised=True)
    for side, true in ((chunks.teacher, want.teacher), (chunks.host.teacher, want.teacher)):
        for found, ids in ((side.next_ids, true.next_ids), (side.before, true.before)):
            assert ids is not None
            found = found.values if isinstance(found, DeviceTensor) else found
            assert torch.equal(found, torch.where(ids < 0, ids, order.places[ids.clamp_min(0)]))
    assert isinstance(chunks.student.next_ids, DeviceTensor)
    assert torch.equal(chunks.student.next_ids.values, want.student.next_ids)


def test_a_pair_is_side_by_side() -> None:
    """Pairs at the student's number, then the other tokens with entries, or of events, then the rest, by hand."""
    W = ProjectionMatrix.from_topk(
        [[4, -1], [2, -1], [2, 0], [-1, -1], [5, -1], [1, -1], [3, -1]],
        [[1.0, 0], [1.0, 0], [0.5, 0.5], [0, 0], [0.9, 0], [1.0, 0], [1.0, 0]],
        teacher_vocab_size=6,
    )
    # Pairs 0-4, 5-1, 6-3; the last has no column of its own, and takes the first that is free.
    assert W.teacher_order().tokens.tolist() == [4, 3, 0, 2, 5, 1]
    student, teacher = Vocabulary([b"1", b"9", b"19", b"a"]), Vocabulary([b"9", b"1", b"ab", b"b", b"a"])
    order = PieceIndex.build(student, teacher).teacher_order()
    # "9" and "a" are no pair's: "19" is "1", so "1" is not; "ab" is "a".
    assert order.tokens.tolist() == [1, 0, 2, 4, 3]
    assert order.places.tolist() == [1, 0, 2, 4, 3]
    again = pickle.loads(pickle.dumps(order))
    assert torch.equal(again.tokens, order.tokens)


def test_a_piece_index_there_and_back() -> None:
    """All of it is in its place again, the order of pieces too; and in between it is one that is checked."""
    index = PieceIndex.build(*(Vocabulary(tokens(size, side)) for side, size in enumerate((40, 53))), texts=())
    order = shuffled(53)
    there = renumbered(index.data, order)
    assert not torch.equal(there, index.data)
    teacher = PieceIndex(there).teacher
    owner = torch.repeat_interleave(torch.arange(53), teacher.joined_ptr.diff())
    assert bool(((teacher.joined.diff() > 0) | (owner.diff() > 0)).all())
    assert int(owner.bincount().max()) > 1
    assert torch.equal(renumbered(there, TeacherOrder(order.places)), index.data)


def test_what_is_missing_comes_last() -> None:
    """A model may lack columns for tokens that take no part: there too, in the orders that are made."""
    W = ProjectionMatrix.from_topk([[1], [0], [3]], [[1.0], [1.0], [1.0]], teacher_vocab_size=6)
    alignment = xtoken.Alignment([[1, 2, 1, 2], [2, 3, 2, 3]])
    student, teacher = torch.randn(3, 3), torch.randn(3, 4)
    order = W.teacher_order()
    assert order.tokens.tolist() == [1, 0, 3, 2, 4, 5]
    loss = OPERATIONS[PROJECTED].function()
    want = loss(student, teacher, alignment, W)
    assert_close(loss(student, OrderedLogits(teacher[:, order.tokens[:4]], order), alignment, W), want, rtol=1e-5)
    with pytest.raises(ValueError, match="teacher_logits: expected at least 6 columns"):
        loss(student, OrderedLogits(teacher[:, :2], order), alignment, W)


def test_a_real_pair() -> None:
    """Llama 3 and Qwen3: five of six rows have their partner's column beside them; the losses agree."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
    from real_pair import load

    pair, alignment = load()
    assert pair.projection is not None
    assert pair.pieces is not None
    W, pieces = pair.projection, pair.pieces
    orders = W.teacher_order(), pieces.teacher_order()
    students = torch.arange(W.shape[0])
    partner = torch.where(W.row_ptr.diff() == 1, W.col[W.row_ptr[:-1].clamp_max(W.nnz - 1)].long(), -1)
    assert int((orders[0].tokens[students] == partner).sum()) >= 104_056
    own = pieces.student.event == pieces.teacher.event[orders[1].tokens[students]]
    assert int(own.sum()) > 100_000
    few = xtoken.Alignment(alignment.spans[:6], None, alignment.student_ids, alignment.teacher_ids)
    rows = [int(end) for end in few.spans[-1, 1::2]]
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(n, size, generator=generator) for n, size in zip(rows, W.shape, strict=True))
    for needs, given, order in ((Needs.PROJECTION, W, orders[0]), (Needs.PIECES, pieces, orders[1])):
        loss, found = registered()[DEFAULT[needs]].function(), []
        for logits in (teacher, put(teacher, order)):
            leaf = student.clone().requires_grad_()
            value = loss(leaf, logits, few, given)
            value.backward()
            found.append((value.detach(), leaf.grad))
        assert_same(found[1], found[0])


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_documented_where_it_is_taken(name: str) -> None:
    is_taken = registered()[name].needs is not Needs.SAME_TOKENIZER
    assert ("`OrderedLogits`" in str(OPERATIONS[name].function().__doc__)) == is_taken


def test_what_cannot_be_mixed() -> None:
    case, order = make_case(), shuffled(59)
    student, teacher = case.student.float(), case.teacher.float()
    loss = OPERATIONS[PROJECTED].function()
    with pytest.raises(ValueError, match=f"loss='{SHARED}', which compares every column with the student's"):
        XTokenLoss([xtoken.Teacher()])(student, torch.zeros(2, 14).long(), OrderedLogits(student, shuffled(67)))
    with pytest.raises(TypeError, match="teacher_logits: expected columns in the tokenizer's order, got OrderedLogits"):
        OPERATIONS[SHARED].function()(student, OrderedLogits(student, shuffled(67)))
    for needs in (Needs.PROJECTION, Needs.PIECES):
        with pytest.raises(ValueError, match=r"teacher_logits: expected an order of the 59 teacher tokens .*, got one"):
            OPERATIONS[DEFAULT[needs]].public(case, student, OrderedLogits(teacher, shuffled(58)))
    with pytest.raises(TypeError, match="student_logits: expected columns in the tokenizer's order, got OrderedLogits"):
        loss(OrderedLogits(student, shuffled(67)), teacher, case.alignment, case.projection)
    with pytest.raises(TypeError, match="logits: got TopKLogits, which name their tokens"):
        OrderedLogits(TopKLogits(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1)), order)
    with pytest.raises(TypeError, match="logits: expected a tensor or LinearLogits, got OrderedLogits"):
        OrderedLogits(put(teacher, order), order)
    with pytest.raises(TypeError, match="order: expected a TeacherOrder, got Tensor"):
        OrderedLogits(teacher, order.tokens)
    with pytest.raises(TypeError, match="logits: expected columns in the tokenizer's order, got OrderedLogits"):
        xtoken.losses.logits.materialised(put(teacher, order))
    for wrong in ([0, 0], [1, 2], [[0]], []):
        with pytest.raises(ValueError, match="tokens: expected every teacher id once"):
            TeacherOrder(wrong)


@needs_what_a_graph_says
def test_an_order_is_refused_in_a_graph() -> None:
    case, order = make_case(), shuffled(59)
    compiled = torch.compile(OPERATIONS[PROJECTED].function(), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"expected the tokenizer's own order inside of torch\.compile"):
        compiled(case.student.float(), put(case.teacher.float(), order), case.alignment, case.projection)
    torch.compiler.reset()


def test_the_matrix_is_made_once() -> None:
    case, order = make_case(), shuffled(59)
    made = [matrix_in(order, Matrix.of(case.projection)) for _ in range(2)]
    assert made[0].col is made[1].col
    assert made[0].weight is made[1].weight
