"""Evaluation on two gloo ranks: the same generations and scores, also when what one rank began two finish."""

import json
from pathlib import Path
from typing import Any

import pytest

from dllm_jepa.evals import ResultsFolder
from tests.launching import SMALL_EVAL, eval_here, run_here, run_on_ranks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hardly trained model; at a temperature it writes something else to every prompt."""
    run = tmp_path_factory.mktemp("model") / "run"
    run_here(run, "max_steps=2", "export=online")
    return run / "hf"


def scores_of(output_dir: Path) -> dict[str, Any]:
    return json.loads((output_dir / "scores.json").read_text())["scores"]


def test_two_ranks_give_what_one_gives(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [f"checkpoint_dir={model}", "task.num_pairs=11", "batch_size=2", "decoding.temperature=0.8"]
    eval_here(tmp_path / "one", *overrides)
    whole = (tmp_path / "one" / "generations.jsonl").read_bytes()
    assert len(set(whole.splitlines())) == 11

    kept = ResultsFolder.append

    def append(self: ResultsFolder, rank: int, batch: int, *rest: Any) -> None:
        if batch == 2:
            raise KeyboardInterrupt
        kept(self, rank, batch, *rest)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(ResultsFolder, "append", append)
        eval_here(tmp_path / "begun", *overrides)
    (part,) = (tmp_path / "begun" / "parts").iterdir()
    assert len(part.read_text().splitlines()) == 2

    runs = {tmp_path / "two": overrides, tmp_path / "begun": [*overrides, "resume=auto"]}
    run_on_ranks(2, runs, recipe="dllm_jepa_eval", base=SMALL_EVAL)
    for name in ("two", "begun"):
        assert (tmp_path / name / "generations.jsonl").read_bytes() == whole
        assert scores_of(tmp_path / name) == scores_of(tmp_path / "one")


def test_what_is_wrong_is_one_message_of_all_ranks(model: Path, tmp_path: Path) -> None:
    wrong = [f"checkpoint_dir={model}", "decoding.gen_length=250", "decoding.block_length=250", "decoding.steps=250"]
    with pytest.raises(AssertionError) as raised:
        run_on_ranks(2, {tmp_path / "out": wrong}, recipe="dllm_jepa_eval", base=SMALL_EVAL)
    message = str(raised.value)
    assert message.count("error: pair") == 1 and "the model's context is" in message
    assert "FileNotFoundError" not in message and not (tmp_path / "out").exists()
