"""Exact language models over a finite set of texts, and losses between them: what the truth test stands on.

Every text is equally likely and each tokenizer cuts it in one way, so the probability of a next token is a count over
the texts that begin with the same tokens.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from cases import Case, Pair
from torch import Tensor

from xtoken import Aligner, Alignment, PieceIndex, ProjectionMatrix, Vocabulary
from xtoken.losses.spelling import groups, spelling, token_bytes
from xtoken.pieces import Side
from xtoken.projection import DOMINANT_WEIGHT, EXACT_WEIGHT, common_pairs

FLOOR = -18.0
"""Log-probability of a token that never comes."""


class ExactModel:
    """Counts of the next token, by what stands before it. A node is a beginning that some of the texts share."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self.following: list[Counter[int]] = [Counter()]
        self.paths: list[list[int]] = []
        """The node before each token of each text."""
        children: dict[tuple[int, int], int] = {}
        for tokens in texts:
            node, path = 0, []
            for token in tokens:
                path.append(node)
                self.following[node][token] += 1
                node = children.setdefault((node, token), len(self.following))
                if node == len(self.following):
                    self.following.append(Counter())
            self.paths.append(path)

    def rows(self, nodes: Sequence[int], ids: Sequence[int]) -> Tensor:
        """float64 [nodes, ids]: log-probabilities of these tokens, which are all that follow."""
        column = {token: i for i, token in enumerate(ids)}
        rows = torch.zeros(len(nodes), len(ids), dtype=torch.float64)
        for row, node in zip(rows, nodes, strict=True):
            for token, count in self.following[node].items():
                row[column[token]] = count
        return (rows / rows.sum(-1, keepdim=True)).log().clamp_min(FLOOR).log_softmax(-1)


class Use(NamedTuple):
    """A chunk that a student's row helps to predict: nodes and tokens of both sides, and the row's place in it."""

    student: tuple[int, ...]
    student_ids: tuple[int, ...]
    teacher: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    before: tuple[int, int]
    """The tokens before the chunk."""
    follows: bool
    """Whether another chunk ends with them."""
    place: int


class Context(NamedTuple):
    """A row of the student, and how often it is used for what."""

    node: int
    uses: Counter[Use]

    @property
    def texts(self) -> int:
        return self.uses.total()

    @property
    def is_start(self) -> bool:
        """Whether chunks begin at it in more than half of the texts."""
        return 2 * sum(n for use, n in self.uses.items() if use.place == 0) > self.texts


class World:
    """A pair of tokenizers, a set of texts as each of them cuts it, and what both exact models have to do with each
    other in it."""

    def __init__(self, student: Vocabulary, teacher: Vocabulary, cut: Sequence[Sequence[Sequence[int]]]) -> None:
        self.student, self.teacher = map(ExactModel, cut)
        chunks = Aligner(student, teacher, num_threads=1).align(*cut)
        self.uses: dict[int, Counter[Use]] = {}
        last: tuple[int, ...] = ()
        for text, (a, b, c, d) in zip(chunks.sample_index.tolist(), chunks.spans.tolist(), strict=True):
            follows, last = last == (text, a, c), (text, b, d)
            if min(a, c) == 0:
                continue  # nothing predicts the first token
            before = cut[0][text][a - 1], cut[1][text][c - 1]
            nodes = tuple(self.student.paths[text][a:b]), tuple(self.teacher.paths[text][c:d])
            for place, node in enumerate(nodes[0]):
                use = Use(
                    nodes[0], tuple(cut[0][text][a:b]), nodes[1], tuple(cut[1][text][c:d]), before, follows, place
                )
                self.uses.setdefault(node, Counter())[use] += 1

    @classmethod
    def of(cls, student: Vocabulary, teacher: Vocabulary, texts: Sequence[str]) -> World:
        """Of the texts, cut by the tokenizers of both vocabularies."""
        return cls(student, teacher, [[one.encode(text.encode()) for text in texts] for one in (student, teacher)])

    def contexts(self, starts: int, inner: int) -> list[Context]:
        """So many rows where chunks start, and so many inside chunks: those with most to learn.

        That is the number of texts times the chance that two draws of the next token differ, the student's and (where a
        chunk starts) the teacher's.
        """

        def chance(counts: Counter[int]) -> float:
            return 1 - sum(n * n for n in counts.values()) / counts.total() ** 2

        def weight(context: Context) -> float:
            teacher = sum(
                n * chance(self.teacher.following[use.teacher[0]]) for use, n in context.uses.items() if use.place == 0
            )
            return context.texts * chance(self.student.following[context.node]) + teacher

        found = sorted((Context(*item) for item in self.uses.items()), key=weight, reverse=True)
        found = [context for context in found if weight(context) > 1]
        sorts = [[context for context in found if context.is_start == is_start] for is_start in (True, False)]
        return sorts[0][:starts] + sorts[1][:inner]


# --- the tokens that matter


class Vocabularies(NamedTuple):
    """Token ids of both sides, ascending."""

    student: list[int]
    teacher: list[int]


def pieces_of(side: Side, token: int) -> list[int]:
    return side.pieces[int(side.ptr[token]) : int(side.ptr[token + 1])].tolist()


class Whole:
    """An index of a pair's whole vocabularies, to find what belongs to a part of their tokens."""

    def __init__(self, pair: Pair) -> None:
        assert pair.pieces is not None
        assert pair.projection is not None
        self.pieces, self.projection = pair.pieces, pair.projection
        self.sides = (pair.pieces.student, pair.pieces.teacher)

    @cached_property
    def roots(self) -> tuple[dict[int, int], dict[int, int]]:
        """Of each side the first token of every event."""
        found = []
        for side in self.sides:
            first: dict[int, int] = {}
            for token, event in enumerate(side.event.tolist()):
                first.setdefault(event, token)
            found.append(first)
        return found[0], found[1]

    @cached_property
    def beginning(self) -> tuple[dict[tuple[int, ...], int], dict[tuple[int, ...], int]]:
        """Of each side one token for every beginning of two and more pieces that a token has."""
        found = []
        for side in self.sides:
            tokens: dict[tuple[int, ...], int] = {}
            ptr, pieces = side.ptr.tolist(), side.pieces.tolist()
            for token in side.ptr.diff().argsort(stable=True).tolist():  # the one with no more pieces, if there is one
                start, stop = ptr[token : token + 2]
                for end in range(start + 2, stop + 1):
                    tokens.setdefault(tuple(pieces[start:end]), token)
            found.append(tokens)
        return found[0], found[1]

    @cached_property
    def spelled(self) -> tuple[list[list[int]], list[list[int]]]:
        """Of each teacher token the students that it and its ends begin with; and, if it has no partner, the shortest
        teacher token like it and a student that begins with what that has behind its own first student."""
        assert self.pieces.text is not None
        arguments = self.pieces.data, self.pieces.text, torch.device("cpu")
        known, grouped = spelling(*arguments), groups(*arguments)
        students = [one.tolist() for one in known.longest.split(known.teacher_length.tolist())]
        students = [[s for s in (*one, first) if s < self.pieces.shape[0]]
                    for one, first in zip(students, known.beginning.tolist(), strict=True)]  # fmt: skip
        rest = grouped.order[grouped.first] if len(grouped.first) else grouped.first
        teachers: list[list[int]] = [[] for _ in students]
        for token in (grouped.group < len(rest)).nonzero()[:, 0].tolist():
            group = int(grouped.group[token])
            students[token].append(int(rest[group]))
            teachers[token].append(int(grouped.shortest[group]))
        return students, teachers

    @cached_property
    def pairs(self) -> list[tuple[dict[int, int], dict[int, int]]]:
        """Partners of students and teachers by W, for either least weight."""
        found = []
        for weight in (EXACT_WEIGHT, DOMINANT_WEIGHT):
            students, teachers = (ids.tolist() for ids in common_pairs(self.projection, weight))
            found.append((dict(zip(students, teachers, strict=True)), dict(zip(teachers, students, strict=True))))
        return found

    def related(self, side: int, token: int) -> Iterator[tuple[int, int]]:
        """What has to be there beside a token, as (side, token): its pieces, the roots of its event, its images under
        W, its partners, and what its bytes begin with."""
        event = int(self.sides[side].event[token])
        for other in (0, 1):
            if event in self.roots[other]:
                yield other, self.roots[other][event]
        size = self.pieces.shape[1 - side]
        yield from ((1 - side, piece) for piece in pieces_of(self.sides[side], token) if piece < size)
        if side == 0:
            yield from ((1, column) for column in self.projection.row(token)[0].tolist())
        else:
            yield from ((other, one) for other in (0, 1) for one in self.spelled[other][token])
        for partners in self.pairs:
            if token in partners[side]:
                yield 1 - side, partners[side][token]

    def closed(self, tokens: Iterable[tuple[int, int]]) -> Vocabularies:
        """The smallest vocabularies with these tokens (side, id) and all that are related to one of them; padded with
        tokens without a partner, so that no distance between sorted lists is cut short."""
        occurring = set(tokens)
        known = self._with_related(occurring)
        for side in (0, 1):
            wanted = sum(one != side and token in self.alone[one] for one, token in occurring)
            known |= {(side, token) for token in itertools.islice(self.alone[side], wanted)}
        known = self._with_related(known)
        return Vocabularies(*(sorted(token for one, token in known if one == side) for side in (0, 1)))

    def _with_related(self, known: set[tuple[int, int]]) -> set[tuple[int, int]]:
        known, new = set(known), known
        while new:
            new = {one for pair in new for one in self.related(*pair)} - known
            known |= new
        return known

    @cached_property
    def alone(self) -> tuple[dict[int, None], dict[int, None]]:
        """Of each side the tokens that have no partner by one of the least weights."""
        found = [
            {token: None for token in range(size) if not all(token in partners[side] for partners in self.pairs)}
            for side, size in enumerate(self.pieces.shape)
        ]
        return found[0], found[1]


def restricted_pieces(pieces: PieceIndex, ids: Vocabularies) -> PieceIndex:
    """The index of the tokens `ids` alone, numbered in their order."""
    sides = (pieces.student, pieces.teacher)
    kept = [torch.tensor(one) for one in ids]
    places = [torch.full((size + 1,), len(one)) for size, one in zip(pieces.shape, ids, strict=True)]
    for place, one in zip(places, kept, strict=True):
        place[one] = torch.arange(len(one))
    events = torch.cat([side.event[one] for side, one in zip(sides, kept, strict=True)]).unique(return_inverse=True)
    data: list[Tensor] = []
    counts: list[list[int]] = [[], []]
    for s, (side, event) in enumerate(zip(sides, events[1].split([*map(len, kept)]), strict=True)):
        rows = [places[1 - s][pieces_of(side, token)] for token in ids[s]]
        order = places[s][side.order.long()]
        ptr = torch.tensor([0, *map(len, rows)]).cumsum(0)
        alike = torch.full((pieces.events,), len(kept[s]))  # of joined tokens only the event counts
        alike[side.event[kept[s]].long()] = torch.arange(len(kept[s]))
        alike = alike[side.event[side.joined.long()].long()]
        joined = [alike[side.joined_ptr[t] : side.joined_ptr[t + 1]] for t in ids[s]]
        joined = [tokens[tokens < len(kept[s])].unique() for tokens in joined]
        joined_ptr = torch.tensor([0, *map(len, joined)]).cumsum(0)
        data += [event, side.length[kept[s]], order[order < len(kept[s])], ptr, *rows, joined_ptr, *joined]
        counts[0].append(int(ptr[-1]))
        counts[1].append(int(joined_ptr[-1]))
    head = torch.tensor([*map(len, ids), len(events[0]), *counts[0], *counts[1]])
    assert pieces.text is not None
    texts = token_bytes(pieces.data, pieces.text)
    text = b"".join(side[token] for side, one in zip(texts, ids, strict=True) for token in one)
    return PieceIndex(torch.cat([head, *data]).int(), text=torch.tensor(bytearray(text), dtype=torch.uint8))


def restricted_projection(W: ProjectionMatrix, ids: Vocabularies) -> ProjectionMatrix:
    """The rows and columns of W that belong to the tokens `ids`."""
    column = {token: i for i, token in enumerate(ids.teacher)}
    col: list[int] = []
    weight: list[float] = []
    row_ptr = [0]
    for token in ids.student:
        for one, value in zip(*(part.tolist() for part in W.row(token)), strict=True):
            if one in column:
                col.append(column[one])
                weight.append(value)
        row_ptr.append(len(col))
    return ProjectionMatrix(row_ptr, col, weight, len(ids.teacher))


# --- the problem


class Problem:
    """Rows of the student that are free, everything else exact: the mean loss of the chunks that use each row.

    On the tokens `ids`, by default those that matter in it.
    """

    def __init__(
        self, world: World, contexts: Sequence[Context], whole: Whole, ids: Vocabularies | None = None
    ) -> None:
        self.contexts = contexts
        flat = [(i, use, count) for i, context in enumerate(contexts) for use, count in context.uses.items()]
        uses = [use for _, use, _ in flat]
        models = (world.student, world.teacher)
        nodes = [sorted({node for use in uses for node in use[2 * side]}) for side in (0, 1)]
        follow = [(side, token) for use in uses for side, token in enumerate(use.before)]
        follow += [(side, token) for side in (0, 1) for node in nodes[side] for token in models[side].following[node]]
        self.ids = ids or whole.closed([*follow, *self._beginnings(uses, models, whole)])
        self.pair = Pair(restricted_projection(whole.projection, self.ids), restricted_pieces(whole.pieces, self.ids))
        student, teacher = (model.rows(*rest) for model, *rest in zip(models, nodes, self.ids, strict=True))
        self.truth = student[[nodes[0].index(context.node) for context in contexts]]
        """float64 [contexts, student ids]: log-probabilities."""
        row = [{node: i for i, node in enumerate(one)} for one in nodes]
        column = [{token: i for i, token in enumerate(one)} for one in self.ids]
        self.owner = torch.tensor([i for i, _, _ in flat])
        counts = torch.tensor([float(count) for _, _, count in flat], dtype=torch.float64)
        total = torch.zeros(len(contexts), dtype=torch.float64).index_add(0, self.owner, counts)
        self.share = counts / total[self.owner]
        self.exact = student
        # A sample is the tokens before the chunk, and the chunk.
        self.index, index = (
            torch.tensor(_padded([[row[s][node] for node in use[2 * s]] for use in uses])) for s in (0, 1)
        )
        self.index[torch.arange(len(uses)), torch.tensor([use.place for use in uses])] = len(student) + self.owner
        self.teacher = teacher[index]
        tokens = [[[column[s][t] for t in (use.before[s], *use[2 * s + 1])] for use in uses] for s in (0, 1)]
        spans, ends = [], [0]
        for use in uses:
            spans += [[0, 1, 0, 1]] * use.follows + [[1, 1 + len(use.student), 1, 1 + len(use.teacher)]]
            ends.append(len(spans))
        self.chunks = Alignment(spans, ends, *map(_padded, tokens))

    @staticmethod
    def _beginnings(
        uses: Sequence[Use], models: tuple[ExactModel, ExactModel], whole: Whole
    ) -> Iterator[tuple[int, int]]:
        """A token for each event inside a token: it begins with the known pieces and a next one."""
        for use in set(uses):
            for side in (0, 1):
                nodes, tokens = use[2 - 2 * side], use[3 - 2 * side]
                known = [(node, tokens[first:end]) for end, node in enumerate(nodes) for first in range(end)]
                for node, pieces in known:
                    for following in models[1 - side].following[node]:
                        token = whole.beginning[side].get((*pieces, following))
                        if token is not None:
                            yield side, token

    def losses(self, case: Case, free: Tensor, **options: Any) -> Tensor:
        """[contexts]: the mean loss of the chunks that use each free row, whose logits are given."""
        student = torch.cat([self.exact.to(free.dtype), free])[self.index]
        teacher = self.teacher.to(free.dtype)
        losses = case(student, teacher, self.chunks, self.pair, reduction="none", **options)
        losses = losses[self.chunks.offsets[1:] - 1]
        return torch.zeros(len(self.contexts), dtype=losses.dtype).index_add(
            0, self.owner, losses * self.share.to(losses.dtype)
        )

    def event_distance(self) -> Tensor:
        """float64 [contexts]: how far both sides' probabilities of events are apart where chunks start with the row.

        The total variation, a mean over texts. To a KL on events this is the bias that exact models leave.
        """
        assert self.pair.pieces is not None
        sides = (self.pair.pieces.student, self.pair.pieces.teacher)
        is_start = self.index[:, 0] >= len(self.exact)
        rows = self.truth[self.owner], self.teacher[:, 0]
        masses = [
            row.new_zeros(len(row), self.pair.pieces.events).index_add(1, side.event.long(), row.exp())
            for row, side in zip(rows, sides, strict=True)
        ]
        apart = (masses[0] - masses[1]).abs().sum(-1) / 2 * is_start * self.share
        shares = torch.zeros(2, len(self.contexts), dtype=torch.float64)
        apart, starts = shares.index_add(1, self.owner, torch.stack([apart, is_start * self.share]))
        return apart / starts.clamp_min(1e-9)


def _padded(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows filled up with zeros, to one more than the longest."""
    width = 1 + max(map(len, rows))
    return [[*row, *[0] * (width - len(row))] for row in rows]
