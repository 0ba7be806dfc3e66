"""Several teachers as one."""

from __future__ import annotations

import pytest
import torch
from comparer import assert_close

from xtoken import Alignment, TopKLogits
from xtoken.train.ensemble import chunks_of_one, keep, mean_logits, position_alignment, select_best


def test_mean_of_probabilities():
    logits = [torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)]
    ids = [torch.zeros(2, 3)] * 2
    want = 0.25 * logits[0].softmax(-1) + 0.75 * logits[1][..., :5].softmax(-1)
    assert_close(mean_logits(logits, ids, [1.0, 3.0]), want.log(), rtol=1e-12)
    assert_close(mean_logits(logits, ids, [0.0, 3.0], 4), logits[1][..., :4].log_softmax(-1), rtol=1e-12)
    assert mean_logits([logits[0].bfloat16()], ids[:1], [1.0]).dtype == torch.float32


def test_bad_means():
    logits, ids = torch.zeros(1, 2, 3), torch.zeros(1, 2)
    with pytest.raises(ValueError, match="expected 'average' teachers to read the same ids"):
        mean_logits([logits, logits], [ids, ids + 1], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"weights: expected one above 0 for the mean of the teachers, got \[0.0\]"):
        mean_logits([logits], [ids], [0.0])
    top = TopKLogits(torch.zeros(1, 2, 1, dtype=torch.int64), torch.zeros(1, 2, 1))
    with pytest.raises(ValueError, match="expected logits in memory for 'average', got TopKLogits"):
        mean_logits([top], [ids], [1.0])


def test_a_chunk_for_each_label():
    labels = torch.tensor([[5, 6, -100, 7], [-100, -100, -100, -100]])
    alignment = position_alignment(labels)
    assert alignment.spans.tolist() == [[1, 2, 1, 2], [3, 4, 3, 4]]
    assert alignment.offsets.tolist() == [0, 2, 2]
    assert labels[0, 0] == 5


def test_selects_by_cross_entropy_a_student_token():
    """Sample 0: equal nats, but the second teacher's chunks hold two of the student's tokens, so it is better; sample 1
    has chunks with the first teacher only; sample 2 with none."""
    first = Alignment([[1, 2, 1, 2], [1, 2, 1, 2]], [0, 1, 2, 2])
    second = Alignment([[1, 3, 1, 2], [0, 1, 0, 1]], [0, 1, 2, 2])  # no row predicts the chunk of sample 1
    ids = torch.zeros(3, 3, dtype=torch.int64)
    logits = torch.zeros(3, 3, 4)
    best = select_best([first, second], [logits, logits], [ids, ids], [None, 4])
    assert best[0].predicted.tolist() == [False, True]
    assert best[1].predicted.tolist() == [True, False]
    assert first.predicted.tolist() == [True, True]  # the given ones stay as they are
    better = logits.clone()
    better[0, 0, 0] = 10.0  # what predicts token 1
    best = select_best([first, second], [better, logits], [ids, ids], [4, 4])
    assert best[0].predicted.tolist() == [True, True]
    top = TopKLogits(torch.zeros(3, 3, 1, dtype=torch.int64), torch.full((3, 3, 1), -1e-3))
    best = select_best([first, second], [logits, top], [ids, ids], [4, 4])
    assert best[1].predicted.tolist() == [True, False]


def test_how_many_chunks_one_teacher_has():
    """Sample 0: two and three chunks; sample 1: one, of the first alone; sample 2: none, and one without a label."""
    labels = torch.tensor([[-100, 1, 1, 1], [-100, 1, 1, -100], [-100, 1, -100, -100]])
    first = Alignment([[1, 2, 1, 2], [2, 4, 2, 3], [1, 3, 1, 2], [2, 3, 1, 2]], [0, 2, 3, 4])
    second = Alignment([[1, 2, 1, 2], [2, 3, 2, 3], [3, 4, 3, 4]], [0, 3, 3, 3])
    assert chunks_of_one([first, second], labels) == 2.5 + 1
    assert chunks_of_one([None, second], labels) == 3 + 2 + 1


def test_packed_rows_have_several_samples():
    """Each with the teacher that predicts it best, and its own share of the chunks."""
    first = Alignment([[1, 2, 1, 2], [4, 6, 4, 5]], [0, 2])
    second = Alignment([[1, 2, 1, 2], [4, 5, 3, 4], [5, 6, 4, 5]], [0, 3])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 0]])
    ids, logits, better = torch.zeros(1, 7, dtype=torch.int64), torch.zeros(1, 7, 4), torch.zeros(1, 7, 4)
    better[0, 0, 0] = 10.0  # the second teacher on the first sample; on the other the first has half of the nats
    best = select_best([first, second], [logits, better], [ids, ids], [4, 4], positions)
    assert best[0].predicted.tolist() == [False, True]
    assert best[1].predicted.tolist() == [True, False, False]
    labels = torch.tensor([[-100, 1, 1, -100, 1, 1, -100]])
    assert chunks_of_one([first, second], labels, positions) == 1 + 1.5
    assert chunks_of_one([None, second], labels, positions) == 1.5 + 2


def test_keeps_chunks():
    alignment = Alignment([[1, 2, 1, 2], [2, 4, 2, 3], [4, 5, 3, 4]], [0, 3], predicted=[True, True, False])
    assert keep(alignment, alignment.exact).predicted.tolist() == [True, False, False]
    assert alignment.predicted.tolist() == [True, True, False]


def test_what_is_left_of_an_alignment_on_a_device():
    """Losses take the chunks from the alignment on the host, so that one is cut down."""
    alignment = Alignment([[1, 2, 1, 2], [2, 4, 2, 3], [1, 2, 1, 2]], [0, 2, 3])
    for moved in (alignment, alignment.to("meta")):
        assert keep(moved, moved.host.exact).host.predicted.tolist() == [True, False, True]
        assert keep(moved, moved.host.sample_index < 1).host.predicted.tolist() == [True, True, False]
