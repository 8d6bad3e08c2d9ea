"""Comparing two evaluations: paired numbers by hand, what is refused, and what is only warned of."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dllm_jepa import evals
from dllm_jepa.errors import CheckpointError, DataError
from dllm_jepa.evals import ItemResult, Score, compare
from dllm_jepa.evals._compare import paired_measures
from dllm_jepa.evals._statistics import bootstrap_interval, mcnemar, newcombe_interval

FACTS = {
    "task": "gsm8k",
    "data_sha256": "ab",
    "model": {"weights": "one"},
    "part": "online",
    "decoding": {"kind": "LLaDADecoding", "gen_length": 256, "steps": 256},
}


def results(measures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        ItemResult(item, f"test.jsonl line {item + 1}", Score(values), 7).to_json()
        for item, values in enumerate(measures)
    ]


def evaluation(folder: Path, measures: Sequence[Mapping[str, Any]], **facts: Any) -> Path:
    folder.mkdir()
    rows = results(measures)
    (folder / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = {"facts": FACTS | facts, "num_items": len(rows), "config": {"output_dir": str(folder)}}
    (folder / "scores.json").write_text(json.dumps(scores))
    return folder


A = [{"strict": value, "loss": loss} for value, loss in zip([True] * 5 + [False] * 5, range(10), strict=True)]
B = [
    {"strict": value, "loss": loss / 2}
    for value, loss in zip([True] * 3 + [False, True] * 3 + [True], range(10), strict=True)
]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return evaluation(tmp_path / "a", A), evaluation(tmp_path / "b", B, model={"weights": "two"}, part="target")


def test_numbers_of_a_small_pair(pair: tuple[Path, Path]) -> None:
    lines = (pair[1] / "generations.jsonl").read_text().splitlines(keepends=True)
    (pair[1] / "generations.jsonl").write_text("".join(reversed(lines)))  # their order does not matter
    comparison = compare(*pair)
    assert (comparison.a, comparison.b, comparison.task, comparison.num_items) == (*pair, "gsm8k", 10)
    strict, loss = comparison.measures["strict"], comparison.measures["loss"]
    # A has items 0-4 right, B items 0, 1, 2, 4, 6, 8 and 9.
    assert (strict.n, strict.a, strict.b, strict.difference) == (10, 0.5, 0.7, pytest.approx(0.2))
    assert (strict.both, strict.only_a, strict.only_b) == (4, 1, 3)
    assert strict.p_value == mcnemar(1, 3) and strict.interval == newcombe_interval(4, 1, 3, 2)
    assert (loss.n, loss.a, loss.b, loss.difference) == (10, 4.5, 2.25, -2.25)
    assert loss.interval == bootstrap_interval([-value / 2 for value in range(10)])
    assert (loss.both, loss.only_a, loss.only_b, loss.p_value) == (None, None, None, None)
    # Another model is what a comparison is about.
    assert comparison.warnings == []


def test_text_shows_every_number(pair: tuple[Path, Path]) -> None:
    lines = str(compare(*pair)).splitlines()
    assert lines[0] == f"gsm8k, 10 items; A: {pair[0]}, B: {pair[1]}"
    assert lines[2].split() == "measure items A B B - A 95 % interval both only A only B p".split()
    assert lines[3].split()[:8] == "strict 10 50.0 % 70.0 % +20.0 %".split()
    assert lines[3].split()[-4:] == ["4", "1", "3", "0.625"]
    assert lines[4].split()[:5] == ["loss", "10", "4.5", "2.25", "-2.25"] and lines[4].split()[-4:] == ["-"] * 4
    assert len(lines) == 5 and len(set(map(len, lines[2:]))) == 1


def test_only_items_to_which_a_measure_applies_in_both_count(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a", [{"match": value, "never": None} for value in (True, None, False, True)])
    b = evaluation(tmp_path / "b", [{"match": value, "never": True} for value in (None, True, True, True)])
    measures = compare(a, b).measures
    assert list(measures) == ["match"]
    assert (measures["match"].n, measures["match"].a, measures["match"].b) == (2, 0.5, 1.0)


def test_settings_that_differ_are_warned_of(tmp_path: Path) -> None:
    decoding = {"kind": "LLaDADecoding", "gen_length": 256, "steps": 64}
    a = evaluation(tmp_path / "a", A, num_shots=4)
    b = evaluation(tmp_path / "b", [{**values, "extra": True} for values in B], decoding=decoding)
    comparison = compare(a, b)
    assert comparison.warnings == [
        "measure extra: in one of the two only",
        "decoding.steps: 256 in A, 64 in B",
        "num_shots: 4 in A, null in B",
    ]
    assert "decoding.steps: 256 in A, 64 in B" in str(comparison)


def test_evaluations_of_something_else_are_refused(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a", A)
    # Of other items the data differ too, but that is only how it shows.
    for number, (measures, facts, expected) in enumerate(
        [
            (B, {"task": "django"}, "task is 'gsm8k' in the first one and 'django'"),
            (B, {"data_sha256": "cd"}, "data_sha256 is 'ab'"),
            (B[:9], {"data_sha256": "cd"}, r"items \(10 and 9\): 9 is in one of them only; .*max_items"),
            (B[:1], {"data_sha256": "cd"}, r"\(10 and 1\): 1, 2, 3, 4, 5, ... are in one"),
        ]
    ):
        with pytest.raises(DataError, match=expected):
            compare(a, evaluation(tmp_path / f"b{number}", measures, **facts))


def test_folders_without_a_finished_evaluation_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        compare(pair[0], tmp_path / "nowhere")
    path = pair[1] / "generations.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match=r"generations.jsonl is damaged: it has 9 items, 10 by .*scores.json"):
        compare(*pair)
    path.write_text("")
    with pytest.raises(DataError, match=r"generations.jsonl has no items"):
        compare(*pair)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"generations.jsonl cannot be read: .*not complete"):
        compare(*pair)
    (pair[1] / "scores.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no scores.json: the evaluation is not finished.*resume=auto"):
        compare(*pair)


def replaced(**fields: Any) -> Callable[[bytes], bytes]:
    return lambda line: json.dumps(json.loads(line) | fields).encode()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda line: line[:20], "is damaged"),
        (lambda line: b"[" * 100_000, "is damaged"),
        (lambda line: b"[]", "is not a result"),
        (lambda line: line.replace(b'"name"', b'"nam"'), "is not a result.*item, name and measures"),
        (replaced(item=True), "is not a result"),
        (replaced(item=0), "item 0 is there twice"),
        (replaced(measures={"strict": "yes"}), "measure 'strict' is 'yes'; it must be"),
        (replaced(measures={"strict": float("nan")}), "measure 'strict' is nan"),
    ],
)
def test_a_damaged_line_is_named(pair: tuple[Path, Path], damage: Callable[[bytes], bytes], expected: str) -> None:
    path = pair[1] / "generations.jsonl"
    lines = path.read_bytes().splitlines()
    lines[3] = damage(lines[3])
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(DataError, match=f"^{re.escape(str(path))} line 4.*{expected}"):
        compare(*pair)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", "is damaged"),
        (b"[]", "no facts with task and data_sha256"),
        (b'{"facts": {"task": "gsm8k", "data_sha256": 3}, "num_items": 10}', "no facts with task and data_sha256"),
        (b'{"facts": {"task": "gsm8k", "data_sha256": "ab"}}', "has no num_items"),
    ],
)
def test_a_damaged_scores_file_is_named(pair: tuple[Path, Path], content: bytes, expected: str) -> None:
    path = pair[0] / "scores.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))} .*{expected}"):
        compare(*pair)


def test_results_are_compared_without_torch() -> None:
    code = "import sys\nfrom dllm_jepa.evals import compare\nprint({'torch', 'datasets', 'torchtune'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
    assert all(getattr(evals, name) is not None for name in dir(evals))
    with pytest.raises(AttributeError, match="has no attribute 'no_task'"):
        evals.no_task  # noqa: B018


def test_pairs_that_cannot_be_made() -> None:
    with pytest.raises(DataError, match="'strict' is true or false in one evaluation and a number in the other"):
        paired_measures(results([{"strict": True}]), results([{"strict": 1.0}]))
