"""The keys of evaluation and generation: what a task is given, prompts from one place, new files, one process."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from dllm_jepa.config import EVALUATION, GENERATION, Launch, Schema, problems

HERE = "tests.config.test_eval_config"
ONE = Launch(world_size=1, local_world_size=1, num_gpus=0)
TWO = Launch(world_size=2, local_world_size=2, num_gpus=0)


def generating_task(
    tokenizer: object, decoding: object, *, source: str, num_shots: int = 0, seed: int, max_items: int, progress: bool
) -> None: ...


def measuring_task(tokenizer: object, *, source: str, seed: int, max_items: int, progress: bool) -> None: ...


def open_task(tokenizer: object, **options: object) -> None: ...


def decoding(gen_length: int, steps: int = 4) -> object:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return object()


def evaluation(folder: Path, **changes: Any) -> dict[str, Any]:
    task = {"_component_": f"{HERE}.generating_task", "source": "x.jsonl"}
    decode = {"_component_": f"{HERE}.decoding", "gen_length": 8}
    required = {"output_dir": str(folder / "out"), "checkpoint_dir": str(folder), "device": "cpu"}
    return required | {"task": task, "decoding": decode, "num_shots": 4} | changes


def generation(folder: Path, **changes: Any) -> dict[str, Any]:
    decode = {"_component_": f"{HERE}.decoding", "gen_length": 8}
    return {"checkpoint_dir": str(folder), "device": "cpu", "prompt": "a", "decoding": decode} | changes


def found(values: dict[str, Any], schema: Schema, launch: Launch = ONE) -> list[str]:
    return problems(OmegaConf.create(values), schema, launch)


def test_sound_configs(tmp_path: Path) -> None:
    assert found(evaluation(tmp_path), EVALUATION) == []
    assert found(evaluation(tmp_path), EVALUATION, TWO) == []
    measuring = {"_component_": f"{HERE}.measuring_task", "source": "x.txt"}
    assert found(evaluation(tmp_path, task=measuring, decoding=None, num_shots=None), EVALUATION) == []
    anything = {"_component_": f"{HERE}.open_task"}
    assert found(evaluation(tmp_path, task=anything), EVALUATION) == []
    assert found(evaluation(tmp_path, num_shots=None), EVALUATION) == []  # the task's own default
    assert found(generation(tmp_path), GENERATION) == []
    files = {"html": str(tmp_path / "a.html"), "output": str(tmp_path / "a.jsonl")}
    assert found(generation(tmp_path, **files), GENERATION) == []


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        pytest.param({"decoding": None}, ["decoding: null given, but {here}.generating_task"], id="no decoding"),
        pytest.param(
            {"task": {"_component_": f"{HERE}.measuring_task", "source": "x"}},
            ["decoding: {here}.measuring_task generates nothing", "num_shots: 4 given, but {here}.measuring_task"],
            id="a decoding and shots for nothing",
        ),
        pytest.param(
            {"task": {"_component_": f"{HERE}.generating_task", "source": "x", "num_shots": 2}},
            ["task.num_shots: 2 given, but the recipe passes this one itself"],
            id="shots in the wrong place",
        ),
        pytest.param(
            {"task": {"_component_": f"{HERE}.generating_tusk"}},
            ["task._component_: '{here}.generating_tusk': {here} has no 'generating_tusk'. Did you mean"],
            id="unknown task",
        ),
        pytest.param({"task": {"_component_": f"{HERE}.generating_task"}}, ["task.source: missing"], id="no source"),
        pytest.param(
            {"decoding": {"_component_": f"{HERE}.decoding", "gen_length": 8, "steps": 0}},
            ["decoding: steps must be at least 1, got 0"],
            id="a decoding that complains",
        ),
        pytest.param({"num_shots": -1}, ["num_shots: -1 given, must be an integer >= 0"], id="negative shots"),
        pytest.param({"max_items": 0}, ["max_items: 0 given, must be an integer >= 1"], id="no items"),
        pytest.param({"resume": "yes"}, ['resume: "yes" given, must be one of never, auto'], id="resume"),
        pytest.param({"checkpoint_dir": "absent"}, ["checkpoint_dir: 'absent' is not a directory"], id="no model"),
        pytest.param({"base_dir": "absent"}, ["base_dir: 'absent' is not a directory"], id="no base"),
        pytest.param({"part": "both"}, ['part: "both" given, must be one of online, target'], id="part"),
        pytest.param({"device": "cuda"}, ["device: cuda, but torch sees no CUDA GPU"], id="no GPU"),
    ],
)
def test_evaluations_that_cannot_run(tmp_path: Path, changes: dict[str, Any], lines: list[str]) -> None:
    got = found(evaluation(tmp_path, **changes), EVALUATION)
    assert len(got) == len(lines), got
    for line, start in zip(got, lines, strict=True):
        assert line.startswith(start.format(here=HERE)), line


@pytest.mark.parametrize(
    ("changes", "launch", "line"),
    [
        pytest.param({"prompt": None}, ONE, "prompt, prompts_file: neither given", id="no prompt"),
        pytest.param({"prompts_file": "a.txt"}, ONE, "prompt, prompts_file: both given", id="two sources"),
        pytest.param({"prompt": None, "prompts_file": "absent.txt"}, ONE, "prompts_file: 'absent.txt' is", id="file"),
        pytest.param({"html": "page.txt"}, ONE, "html: 'page.txt' given, must end in .html", id="ending"),
        pytest.param({"output": "absent/a.jsonl"}, ONE, "output: 'absent/a.jsonl' given, but the folder", id="folder"),
        pytest.param({"html": "there.html"}, ONE, "html: 'there.html' exists and is kept", id="existing file"),
        pytest.param({"decoding": None}, ONE, "decoding: null given, must be a mapping", id="no decoding"),
        pytest.param({"template": "alpaca"}, ONE, 'template: "alpaca" given, must be one of', id="template"),
        pytest.param({}, TWO, "--nproc_per_node: 2 processes, but this recipe runs in one", id="two ranks"),
    ],
)
def test_generations_that_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], launch: Launch, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.html").write_text("kept")
    (got,) = found(generation(tmp_path, **changes), GENERATION, launch)
    assert got.startswith(line)


def test_stdin_needs_no_file(tmp_path: Path) -> None:
    assert found(generation(tmp_path, prompt=None, prompts_file="-"), GENERATION) == []
