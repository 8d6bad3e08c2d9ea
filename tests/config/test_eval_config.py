"""The keys of evaluation and generation: what a task is given, prompts from one place, new files, one process."""

from pathlib import Path
from typing import Any

import dllm_jepa_eval
import dllm_jepa_generate
import pytest

from dllm_jepa.config import Launch, load_config

HERE = "tests.config.test_eval_config"
ONE, TWO = Launch(), Launch(2, 2, 0)
EVALUATION, GENERATION = dllm_jepa_eval.Config, dllm_jepa_generate.Config
DECODING = {"_component_": f"{HERE}.decoding", "gen_length": 8}


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
    required = {"output_dir": str(folder / "out"), "checkpoint_dir": str(folder), "device": "cpu"}
    return required | {"task": task, "decoding": DECODING, "num_shots": 4} | changes


def generation(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"checkpoint_dir": str(folder), "device": "cpu", "prompt": "a", "decoding": DECODING} | changes


def test_sound_configs(tmp_path: Path) -> None:
    measuring = {"_component_": f"{HERE}.measuring_task", "source": "x.txt"}
    for changes in (
        {},
        {"task": measuring, "decoding": None, "num_shots": None},
        {"task": {"_component_": f"{HERE}.open_task"}},
        {"num_shots": None},  # the task's own default
    ):
        assert EVALUATION.problems(evaluation(tmp_path, **changes), TWO) == []
    files = {"html": str(tmp_path / "a.html"), "output": str(tmp_path / "a.jsonl")}
    for changes in ({}, files, {"prompt": None, "prompts_file": "-"}):
        assert GENERATION.problems(generation(tmp_path, **changes), ONE) == []


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"decoding": None}, ["decoding: null given, but {here}.generating_task"]),
        (
            {"task": {"_component_": f"{HERE}.measuring_task", "source": "x"}},
            ["decoding: {here}.measuring_task generates nothing", "num_shots: 4 given, but {here}.measuring_task"],
        ),
        ({"task": {"_component_": f"{HERE}.generating_task"}}, ["task.source: missing"]),
        (
            {"task": {"_component_": f"{HERE}.generating_task", "source": "x", "seed": 2}},
            ["task.seed: 2 given, but the recipe passes this one itself"],
        ),
        (
            {"decoding": DECODING | {"steps": 0}},
            ["decoding: steps must be at least 1, got 0"],
        ),
        ({"num_shots": -1}, ["num_shots: -1 given, must be an integer >= 0 or null"]),
        ({"checkpoint_dir": "absent"}, ["checkpoint_dir: 'absent' is not a directory"]),
        ({"base_dir": "absent"}, ["base_dir: 'absent' is not a directory"]),
        ({"output_dir": __file__}, ["output_dir: '{file}' is a file"]),
        ({"device": "cuda"}, ["device: cuda, but torch sees no CUDA GPU"]),
        ({"lr_scheduler": None}, ["lr_scheduler: a key of dllm_jepa_full and dllm_jepa_lora, not of this recipe"]),
        ({"lr": 1.0}, ["lr: unknown key (value 1.0). The keys are: seed,"]),
    ],
)
def test_evaluations_that_cannot_run(tmp_path: Path, changes: dict[str, Any], lines: list[str]) -> None:
    got = EVALUATION.problems(evaluation(tmp_path, **changes), ONE)
    for line, start in zip(got, lines, strict=True):
        assert line.startswith(start.format(here=HERE, file=__file__)), line


@pytest.mark.parametrize(
    ("changes", "launch", "line"),
    [
        ({"prompt": None}, ONE, "prompt, prompts_file: neither given"),
        ({"prompts_file": "a.txt"}, ONE, "prompt, prompts_file: both given"),
        ({"prompt": None, "prompts_file": "absent.txt"}, ONE, "prompts_file: 'absent.txt' is"),
        ({"html": "page.txt"}, ONE, "html: 'page.txt' given, must end in .html"),
        ({"output": "absent/a.jsonl"}, ONE, "output: 'absent/a.jsonl' given, but the folder"),
        ({"html": "there.html"}, ONE, "html: 'there.html' exists and is kept"),
        ({"html": " "}, ONE, 'html: " " given, must be a path ending in .html or null'),
        ({}, TWO, "--nproc_per_node: 2 processes, but this recipe runs in one"),
    ],
)
def test_generations_that_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], launch: Launch, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.html").write_text("kept")
    (got,) = GENERATION.problems(generation(tmp_path, **changes), launch)
    assert got.startswith(line)


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    evaluated = EVALUATION.problems(evaluation(tmp_path), ONE)
    generated = GENERATION.problems(generation(tmp_path, output=str(tmp_path / "a.jsonl")), ONE)
    for (line,), key in ((evaluated, "output_dir: "), (generated, "output: ")):
        assert line.startswith(key) and "cannot be written to" in line


def test_what_people_write_arrives_as_typed() -> None:
    words = ["--config", "generate", "prompt=a: b # c ${x}", "system_prompt=null", "prompts_file=[1].txt", "seed=3"]
    values = load_config(words, GENERATION)
    assert values["prompt"] == "a: b # c ${x}" and values["prompts_file"] == "[1].txt"
    assert values["system_prompt"] is None and values["seed"] == 3
