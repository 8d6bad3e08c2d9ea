"""The folder of an evaluation: kept batches, refusals, merging, and lines that a kill cut off."""

import json
import threading
from pathlib import Path

import pytest

from dllm_jepa.errors import DataError, LaunchError
from dllm_jepa.evals import ItemResult, ResultsFolder, Score

FACTS = {"model": "abc", "task": {"name": "gsm8k", "sha256": "123"}, "batch_size": 2}


def result(item: int) -> ItemResult:
    return ItemResult(item, f"line {item}", Score({"strict": item % 2 == 0}), 3, {"prediction": f"p{item}"})


def test_batches_of_all_ranks_come_back_in_the_order_of_the_items(tmp_path: Path) -> None:
    """A batch that two ranks did counts once."""
    folder = ResultsFolder(tmp_path / "eval")
    assert folder.open(FACTS, resume=False) == set()
    folder.append(0, 0, [result(3), result(0)], 1.5)
    for rank in (0, 1):
        folder.append(rank, 1, [result(1), result(2)], 2.0)
    rows, seconds = folder.merge(4)
    assert [row["item"] for row in rows] == [0, 1, 2, 3] and seconds == 3.5
    expected = {"item": 3, "name": "line 3", "measures": {"strict": False}, "num_tokens": 3, "prediction": "p3"}
    assert rows[3] == expected
    assert [json.loads(line) for line in folder.generations.read_text().splitlines()] == rows
    assert not folder.is_finished
    folder.finish({"seconds": seconds})
    assert folder.is_finished and folder.merge(4) == (rows, seconds)
    assert sorted(path.name for path in folder.path.iterdir()) == ["facts.json", "generations.jsonl", "scores.json"]


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_line_that_was_cut_off_is_no_finished_batch(tmp_path: Path, cut: int) -> None:
    folder = ResultsFolder(tmp_path)
    folder.open(FACTS, resume=True)
    folder.append(0, 0, [result(0)], 1.0)
    folder.append(0, 1, [result(1)], 1.0)
    part = tmp_path / "parts" / "00000.jsonl"
    part.write_bytes(part.read_bytes()[:-cut])
    complete = {0, 1} if cut == 1 else {0}  # only the line break is missing
    assert folder.open(FACTS, resume=True) == complete
    folder.append(0, 2, [result(2)], 1.0)
    assert folder.open(FACTS, resume=True) == complete | {2}
    if complete == {0, 1}:
        assert [row["item"] for row in folder.merge(3)[0]] == [0, 1, 2]
    else:
        with pytest.raises(DataError, match="has 2 of 3 items: start again with resume=auto"):
            folder.merge(3)
        assert part.exists() and not folder.generations.exists()


def test_an_evaluation_is_not_overwritten_nor_mixed_with_another(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path)
    folder.open(FACTS, resume=False)
    folder.append(0, 0, [result(0)], 1.0)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(LaunchError, match="already holds an evaluation.*resume=auto"):
        folder.open(FACTS, resume=False)
    other = FACTS | {"task": {"name": "gsm8k", "sha256": "999"}, "batch_size": 4}
    with pytest.raises(LaunchError) as raised:
        folder.open(other, resume=True)
    lines = str(raised.value).splitlines()
    assert lines[1:] == ['  task.sha256: "123" there, "999" now', "  batch_size: 2 there, 4 now"]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scores.json", "scores.json is there without its facts.json"),
        ("generations.jsonl", "generations.jsonl is there without its facts.json"),
        ("status.json", "is the output_dir of a training run"),
    ],
)
def test_what_is_no_evaluation_is_left_alone(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_text("precious")
    for resume in (False, True):
        with pytest.raises(LaunchError, match=message):
            ResultsFolder(tmp_path).open(FACTS, resume=resume)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "precious")]


def test_a_rank_waits_for_the_batches_of_the_others(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path)
    folder.open(FACTS, resume=False)
    folder.append(0, 0, [result(0)], 1.0)
    waiting = threading.Thread(target=folder.wait, args=(2,), daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    folder.append(1, 1, [result(1)], 1.0)
    waiting.join(20)
    assert not waiting.is_alive()
    folder.merge(2)
    folder.finish({"seconds": 2.0})
    folder.wait(2)  # one that comes when all is done, and the parts are gone


def test_facts_are_compared_as_json_holds_them(tmp_path: Path) -> None:
    facts = {"interval": (0.0, 1.0), "shots": None}
    ResultsFolder(tmp_path).open(facts, resume=False)
    assert ResultsFolder(tmp_path).open(facts, resume=True) == set()


def test_facts_that_cannot_be_read_or_written_are_named(tmp_path: Path) -> None:
    for content in (b"{", b"\xff", b"[1]"):
        (tmp_path / "facts.json").write_bytes(content)
        with pytest.raises(LaunchError, match=r"facts\.json cannot be read"):
            ResultsFolder(tmp_path).open(FACTS, resume=True)
    with pytest.raises(LaunchError, match="cannot be written"):
        ResultsFolder(tmp_path / "facts.json").open(FACTS, resume=False)
