"""What is opened before a run starts: each finding is a line, and `dllm-jepa validate` reports it."""

import collections
import importlib.util
import json
from pathlib import Path

import dllm_jepa_eval
import pytest
from dllm_jepa_full import Config

from dllm_jepa import cli, preflight
from dllm_jepa.config import load_config

ROWS = """
from dllm_jepa.data import gsm8k
def rows(*, tokenizer, max_seq_len, shift_logits, progress, source, max_rows=None):
    if max_rows is None:
        raise AssertionError("all of the data was read")
    return gsm8k(tokenizer, source=source, max_seq_len=max_seq_len, shift_logits=shift_logits, progress=progress)
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rows.py").write_text(ROWS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)


def found(*words: str, base: str = "tiny") -> list[str]:
    """What `opens` finds; other rules have nothing to say."""
    values = load_config(["--config", base, *words], Config)
    assert Config.problems(values) == []
    return Config.problems(values, opening=True)


def test_what_fits_is_not_spoken_of() -> None:
    assert found() == found(base="tiny_lora") == []


def test_model_tokenizer_and_checkpoint_must_fit() -> None:
    (line,) = found("tokenizer={_component_: dllm_jepa.models.llada.llada_tokenizer, path: absent}")
    assert line.startswith("tokenizer: ") and "absent" in line
    (line,) = found("model.vocab_size=10")
    assert "vocab_size" in line and "10" in line
    (line,) = found("max_seq_len=300", "tokens_per_device=300")
    assert "max_seq_len" in line and "300" in line and "256" in line

    Path("empty").mkdir()
    (line,) = found("checkpoint_dir=empty")
    assert "empty" in line


def test_the_first_rows_must_make_sequences() -> None:
    words = ("dataset={_component_: my_rows.rows, source: rows.jsonl}",)
    (line,) = found(*words)
    assert line.startswith("dataset: ") and "rows.jsonl" in line
    Path("rows.jsonl").write_text(json.dumps({"question": "a"}) + "\n")
    (line,) = found(*words)
    assert line.startswith("dataset: ") and "answer" in line
    Path("rows.jsonl").write_text(json.dumps({"question": "a", "answer": "b #### 1"}) + "\n")
    assert found(*words) == []


def test_a_dataset_of_the_hub_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dllm_jepa.data._sources._read_hub", lambda *_, **__: pytest.fail("the hub was asked"))
    assert found("dataset={_component_: dllm_jepa.data.gsm8k, source: openai/gsm8k, name: main}") == []


def test_state_and_export_must_fit_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = collections.namedtuple("usage", "total used free")
    free = 7_000_000
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage(0, 0, free))
    # A million weights: 4 MB of state, as much of an export in fp32, half of it in bf16.
    saves = ("output_dir=runs/x", "checkpoint.every_n_steps=1")
    (line,) = found(*saves)
    assert line.startswith("output_dir: ") and "MiB free" in line and "choose a folder on another disk" in line
    for room in (["export=null"], ["export_dtype=bf16"], ["checkpoint.directory=elsewhere"], ["resume=auto"]):
        assert found(*saves, *room) == []
    assert found("output_dir=runs/x") == found(*saves, base="tiny_lora") == []  # no state; adapters alone
    (line,) = found("output_dir=runs/x", "export=both")
    free = 8_000
    (line, of_states) = found(*saves, "checkpoint.directory=elsewhere", base="tiny_lora")
    assert line.startswith("output_dir: ") and of_states.startswith("checkpoint.directory: ")


def test_the_package_of_a_logger_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = "metric_logger={_component_: torchtune.training.metric_logging.CometLogger, project: x}"
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "comet_ml" else there(name))
    (line,) = found(logger)
    assert line.startswith("metric_logger: torchtune.training.metric_logging.CometLogger needs the package comet_ml")
    assert "pip install comet-ml" in line
    assert found("metric_logger={_component_: torchtune.training.metric_logging.TensorBoardLogger, log_dir: x}") == []


def test_the_model_and_the_files_of_an_evaluation_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    values = load_config(
        ["--config", "eval_gsm8k", "checkpoint_dir=empty", "output_dir=o", "device=cpu", "dtype=fp32"]
        + ["task.source=no.jsonl", "task.shots_source=no_shots.jsonl"],
        dllm_jepa_eval.Config,
    )
    assert dllm_jepa_eval.Config.problems(values) == []
    model, source, shots = dllm_jepa_eval.Config.problems(values, opening=True)
    assert model.startswith("checkpoint_dir: ") and "empty has no config.json" in model
    assert source.startswith("task.source: 'no.jsonl' does not exist") and shots.startswith("task.shots_source: ")
    values["checkpoint_dir"] = str(Path(__file__).parent / "assets" / "llada_tiny")
    for name in ("no.jsonl", "no_shots.jsonl"):
        (tmp_path / name).touch()
    assert dllm_jepa_eval.Config.problems(values, opening=True) == []


def test_validate_reports_what_does_not_open(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["validate", "dllm_jepa_full", "--config", "tiny", "model.vocab_size=10"])
    assert "the config has a problem:\n  - " in (message := capsys.readouterr().err) and "vocab_size" in message


def test_validate_warns_of_a_folder_that_holds_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "metrics.jsonl").touch()
    words = ["validate", "dllm_jepa_full", "--config", "tiny", "output_dir=held"]
    cli.main(words)
    assert "warning: output_dir: held/metrics.jsonl is there" in capsys.readouterr().err
    cli.main([*words, "resume=auto"])
    assert "output_dir" not in capsys.readouterr().err
