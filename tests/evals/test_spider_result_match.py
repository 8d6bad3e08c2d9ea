"""When two results of queries are the same."""

import itertools
import random
from collections import Counter

import pytest

from dllm_jepa.evals.spider import _result_match
from dllm_jepa.evals.spider._result_match import _Search, same_result
from dllm_jepa.evals.spider._sandbox import Value

Rows = list[tuple[Value, ...]]


def same_under_some_order(gold: Rows, predicted: Rows, *, ordered: bool) -> bool:
    """The rule in plain words: try every order of the columns."""
    if not gold and not predicted:
        return True
    if len(gold) != len(predicted) or len(gold[0]) != len(predicted[0]):
        return False
    for order in itertools.permutations(range(len(gold[0]))):
        moved = [tuple(row[place] for place in order) for row in predicted]
        if moved == gold if ordered else Counter(moved) == Counter(gold):
            return True
    return False


@pytest.mark.parametrize("ordered", [False, True])
def test_it_finds_what_trying_every_order_finds(ordered: bool) -> None:
    draw = random.Random(0)
    outcomes: Counter[bool] = Counter()
    for _ in range(1000):
        values: list[Value] = [0, 1, None, "1", "a", 2.5, b"a"][: draw.randint(2, 7)]
        num_rows, num_columns = draw.randint(0, 5), draw.randint(1, 4)
        gold: Rows = [tuple(draw.choices(values, k=num_columns)) for _ in range(num_rows)]
        order = draw.sample(range(num_columns), num_columns)
        cells = [[row[place] for place in order] for row in gold]
        if draw.random() < 0.5:
            draw.shuffle(cells)
        if draw.random() < 0.5 and cells:
            draw.choice(cells)[draw.randrange(num_columns)] = draw.choice(values)
        predicted: Rows = [tuple(row) for row in cells]
        same = same_under_some_order(gold, predicted, ordered=ordered)
        assert same_result(gold, predicted, ordered=ordered) == same, (gold, predicted)
        outcomes[same] += 1
    assert min(outcomes.values()) > 150


@pytest.mark.parametrize(
    ("gold", "predicted", "unordered", "ordered"),
    [
        ([], [], True, True),
        ([], [(None,)], False, False),
        ([(1,), (2,)], [(2,), (1,)], True, False),
        ([(1,), (1,), (2,)], [(1,), (2,), (2,)], False, False),
        ([(1, "a")], [("a", 1)], True, True),
        ([(1, 2), (3, 4)], [(4, 3), (2, 1)], True, False),
        ([(1, 2), (3, 4)], [(2, 1), (3, 4)], False, False),
        ([(1, 2), (1, 2), (2, 1), (3, 4)], [(1, 2), (2, 1), (2, 1), (3, 4)], False, False),
        ([(1, 1)], [(1,)], False, False),
        ([(1,)], [(1.0,)], True, True),
        ([(1,)], [("1",)], False, False),
        ([(None,)], [(None,)], True, True),
        ([(0.1 + 0.2,)], [(0.3,)], False, False),
        ([(2**53 + 1,)], [(float(2**53),)], False, False),
    ],
)
def test_close_but_wrong_results_are_told_apart(gold: Rows, predicted: Rows, unordered: bool, ordered: bool) -> None:
    assert same_result(gold, predicted, ordered=False) == unordered
    assert same_result(predicted, gold, ordered=False) == unordered
    assert same_result(gold, predicted, ordered=True) == ordered


def shuffled(rows: Rows, seed: int) -> Rows:
    """Rows and columns in another order."""
    draw = random.Random(seed)
    order = draw.sample(range(len(rows[0])), len(rows[0]))
    return draw.sample([tuple(row[place] for place in order) for row in rows], len(rows))


@pytest.mark.parametrize("num_values", [1, 40])
def test_many_columns_with_the_same_values_are_quick(num_values: int) -> None:
    draw = random.Random(1)
    column = [row % num_values for row in range(40)]
    gold: Rows = list(zip(*(draw.sample(column, 40) for _ in range(12)), strict=True))
    assert same_result(gold, shuffled(gold, 2), ordered=False)
    assert same_result(gold, gold, ordered=True)


def test_of_equal_columns_one_is_tried() -> None:
    # Twelve columns that number the rows, and two that fit no order: 12! ways to find that out.
    gold: Rows = [(*["x"] * 12, 1, 2), (*["y"] * 12, 2, 1)]
    predicted: Rows = [(*["x"] * 12, 1, 2), (*["y"] * 12, 1, 2)]
    assert not same_result(gold, predicted, ordered=False)
    search = _Search([(3, 4)] * 12 + [(1, 2), (2, 1)], [(3, 4)] * 12 + [(1, 1), (2, 2)])
    assert not search.succeeds()
    assert search._cells < 100


def edges(is_edge: dict[tuple[int, int], bool]) -> Rows:
    """One row per edge of a graph on 16 points, one column per point, 1 at both ends."""
    return [tuple(int(point in pair) for point in range(16)) for pair, found in is_edge.items() if found]


def test_graphs_that_look_alike_everywhere_are_told_apart() -> None:
    """The 4 x 4 rook's graph and the Shrikhande graph: same degrees, same numbers of common neighbours."""
    rook, shrikhande = {}, {}
    for a, b in itertools.combinations(range(16), 2):
        step = ((a // 4 - b // 4) % 4, (a % 4 - b % 4) % 4)
        rook[a, b] = 0 in step
        shrikhande[a, b] = step in {(0, 1), (0, 3), (1, 0), (3, 0), (1, 1), (3, 3)}
    assert len(edges(rook)) == len(edges(shrikhande)) == 48
    assert not same_result(edges(rook), edges(shrikhande), ordered=False)
    assert same_result(edges(rook), shuffled(edges(rook), 3), ordered=False)
    assert same_result(edges(shrikhande), shuffled(edges(shrikhande), 4), ordered=False)


def test_the_search_gives_up_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    gold: Rows = [(1, 2, 3), (4, 5, 6), (2, 1, 9)]
    assert same_result(gold, shuffled(gold, 5), ordered=False)
    monkeypatch.setattr(_result_match, "_MAX_CELLS", 3)
    assert not same_result(gold, shuffled(gold, 5), ordered=False)
