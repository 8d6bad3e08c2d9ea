"""Which solved examples stand in front of a question."""

from pathlib import Path

import pytest

from dllm_jepa.errors import ConfigError
from dllm_jepa.evals._shots import Shots, in_order, read_solved

EXAMPLES = [("try,", "try :"), ("if not,", "if not x :"), ("try,", "try :"), ("do nothing.", "pass")]


def test_the_first_ones_but_the_question_itself() -> None:
    shots = Shots(EXAMPLES, 2, "train.jsonl")
    assert shots.before("else,") == shots.before("do nothing.") == EXAMPLES[:2]
    # Twice the same example is what the file says.
    assert Shots(EXAMPLES, 3, "train.jsonl").before("else,") == EXAMPLES[:3]
    assert shots.before("if not,") == [EXAMPLES[0], EXAMPLES[2]]
    assert shots.before("try,") == [EXAMPLES[1], EXAMPLES[3]]


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


def read(source: str, num_shots: int, **options: str | None) -> tuple[list[str], str]:
    defaults: dict[str, str | None] = {"name": None, "shots_source": None, "shots_split": "train"}
    rows, where = read_solved(("annotation", "code"), num_shots, source=source, **(defaults | options))
    return [row.values["annotation"] for row in rows], where


def test_where_shots_come_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def load_dataset(source: str, name: str | None, *, split: str) -> list[dict[str, str]]:
        asked.append((source, name, split))
        return [{"annotation": "from the hub", "code": "x"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    hub = "someone/django"
    assert read(hub, 1, name="main") == read(hub, 1, name="main", shots_source=hub) == (["from the hub"], hub)
    assert asked == [(hub, "main", "train")] * 2
    # A configuration of the hub dataset says nothing about a file.
    train = tmp_path / "train.jsonl"
    train.write_text('{"annotation": "try,", "code": "try :"}\n')
    assert read(hub, 1, name="main", shots_source=str(train)) == (["try,"], str(train))


def test_items_of_a_file_are_never_shots_by_default(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text("{}\n")
    for source in (str(tmp_path / "test.jsonl"), "missing.jsonl"):
        with pytest.raises(ConfigError, match=r"task.shots_source: missing; with num_shots=1 .*num_shots=0"):
            read(source, 1)
        assert read(source, 0) == ([], "nothing")
        with pytest.raises(ValueError, match="num_shots must be 0 or more, got -1"):
            read(source, -1)
