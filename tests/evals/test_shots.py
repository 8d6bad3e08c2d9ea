"""Which solved examples stand in front of a question."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from dllm_jepa.data import TASKS
from dllm_jepa.errors import ConfigError, DataError
from dllm_jepa.evals._shots import Shots, in_order
from dllm_jepa.evals._sources import Sources

EXAMPLES = [("try,", "try :"), ("if not,", "if not x :"), ("try,", "try :"), ("do nothing.", "pass")]


def test_the_first_ones_in_their_order() -> None:
    assert Shots(EXAMPLES, 2, "train.jsonl").before("else,") == EXAMPLES[:2]
    # Twice the same example is what the file says.
    assert Shots(EXAMPLES, 3, "train.jsonl").before("else,") == EXAMPLES[:3]
    assert Shots((), 0, "nothing").before("else,") == []


def test_the_question_itself_makes_room_for_the_next_one() -> None:
    shots = Shots(EXAMPLES, 2, "train.jsonl")
    assert shots.before("if not,") == [EXAMPLES[0], EXAMPLES[2]]
    assert shots.before("try,") == [EXAMPLES[1], EXAMPLES[3]]
    assert shots.before("do nothing.") == EXAMPLES[:2]


def test_more_shots_than_rows_are_refused() -> None:
    assert len(Shots(EXAMPLES, 4, "train.jsonl").before("else,")) == 4
    with pytest.raises(ConfigError, match="num_shots=5, but train.jsonl has only 4 rows: lower num_shots"):
        Shots(EXAMPLES, 5, "train.jsonl")
    with pytest.raises(ConfigError, match=r"num_shots=3, but of the 4 rows of train.jsonl only 2 .* the item 'try,'"):
        Shots(EXAMPLES, 3, "train.jsonl").before("try,")
    with pytest.raises(ValueError, match="num_shots must be 0 or more, got -1"):
        Shots(EXAMPLES, -1, "train.jsonl")


def test_seeded_order_is_a_draw() -> None:
    rows = list(range(500))
    drawn = in_order(rows, "seeded", 0)
    assert sorted(drawn) == rows != drawn
    assert in_order(rows, "seeded", 0) == drawn != in_order(rows, "seeded", 1)
    assert in_order(rows, "first_k", 1) == rows
    with pytest.raises(ValueError, match="shots must be first_k or seeded, got 'last'"):
        in_order(rows, "last", 0)


def test_every_row_is_as_likely_to_be_drawn() -> None:
    counts = [0] * 10
    for seed in range(2000):
        for row in in_order(range(10), "seeded", seed)[:3]:
            counts[row] += 1
    # 600 expected, with a standard deviation of 20.
    assert all(500 < count < 700 for count in counts)


def jsonl(path: Path, pairs: Sequence[tuple[str, str]]) -> str:
    path.write_text("".join(json.dumps({"annotation": a, "code": c}) + "\n" for a, c in pairs))
    return str(path)


def test_shots_of_a_file(tmp_path: Path) -> None:
    items, train = jsonl(tmp_path / "test.jsonl", EXAMPLES[:1]), jsonl(tmp_path / "train.jsonl", EXAMPLES)
    sources = Sources(items, "test", None, train, "train")
    assert [row.values["code"] for row in sources.read_items(TASKS["django"])] == ["try :"]
    shots = sources.read_shots(TASKS["django"], 2, "first_k", 0)
    assert (shots.examples, shots.num_shots, shots.source) == (EXAMPLES, 2, train)
    drawn = sources.read_shots(TASKS["django"], 2, "seeded", 3)
    assert drawn.examples == in_order(EXAMPLES, "seeded", 3)


def test_shots_of_a_hub_dataset_come_from_its_other_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def load_dataset(source: str, name: str | None, *, split: str) -> list[dict[str, str]]:
        asked.append((source, name, split))
        return [{"annotation": split, "code": "x"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    sources = Sources("someone/django", "test", "main", None, "train")
    assert sources.read_items(TASKS["django"])[0].values["annotation"] == "test"
    assert sources.read_shots(TASKS["django"], 1, "first_k", 0).examples == [("train", "x")]
    assert asked == [("someone/django", "main", "test"), ("someone/django", "main", "train")]
    # A configuration of the hub dataset says nothing about a file.
    train = jsonl(tmp_path / "train.jsonl", EXAMPLES)
    from_file = Sources("someone/django", "test", "main", train, "train").read_shots(TASKS["django"], 1, "first_k", 0)
    assert from_file.examples == EXAMPLES and len(asked) == 2
    Sources("someone/django", "test", "main", "someone/django", "train").read_shots(TASKS["django"], 1, "first_k", 0)
    assert asked[2:] == [("someone/django", "main", "train")]


def test_items_of_a_file_are_never_shots_by_default(tmp_path: Path) -> None:
    items = jsonl(tmp_path / "test.jsonl", EXAMPLES)
    for source in (items, "missing.jsonl"):
        sources = Sources(source, "test", None, None, "train")
        with pytest.raises(ConfigError, match=r"task.shots_source: missing; with num_shots=1 .*num_shots=0"):
            sources.read_shots(TASKS["django"], 1, "first_k", 0)
        assert sources.read_shots(TASKS["django"], 0, "first_k", 0).examples == []
        with pytest.raises(ValueError, match="num_shots must be 0 or more, got -1"):
            sources.read_shots(TASKS["django"], -1, "first_k", 0)


def test_a_row_that_cannot_be_a_shot_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"annotation": "try,", "code": "try :"}\n{"annotation": "try,"}\n')
    with pytest.raises(DataError, match="train.jsonl line 2 has no field 'code'"):
        Sources("test.jsonl", "test", None, str(path), "train").read_shots(TASKS["django"], 1, "first_k", 0)
