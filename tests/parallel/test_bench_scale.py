"""What vocabulary-parallel losses send, by `bench_scale.py`, at its smallest."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from harness import make_case
from parts import IN_PARTS

from xtoken.losses import Needs, registered

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
bench_scale = importlib.import_module("bench_scale")


def test_every_loss_and_way_to_cut_the_teacher() -> None:
    case = make_case()
    rows = bench_scale.rows_of("toy", case.projection, case.pieces, [2, 3])
    of_losses = {name: [row for row in rows if row["loss"] == registered()[name].title] for name in IN_PARTS}
    assert sum(map(len, of_losses.values())) == len(rows)
    for name, found in of_losses.items():
        ways = {row["teacher"]: row["numbers_a_chunk"] for row in found if row["ranks"] == 2}
        assert len(ways) == 2 if registered()[name].needs is Needs.SAME_TOKENIZER else len(ways) == 3
        assert 0 < ways["whole"] <= ways["in parts"]
        assert all(row["numbers_a_chunk"] <= row["most_of_a_rank"] for row in found)
