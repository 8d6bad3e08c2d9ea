"""Launching as a user does: stock `tune run` from any directory, on one process and two, and with an edited copy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dllm_jepa import cli
from tests.launching import SMALL, metrics, run_here

BIN = Path(sys.executable).parent


def command(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    words = (str(BIN / words[0]), *words[1:])
    return subprocess.run(
        words, cwd=directory, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_tune_run_on_two_ranks_writes_one_run(tmp_path: Path) -> None:
    done = command(
        tmp_path, "tune", "run", "--nproc_per_node", "2", "dllm_jepa_full", *SMALL, "max_steps=2", "export=online"
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/tiny"
    assert [row["step"] for row in metrics(run)] == [1, 2]
    assert sorted(path.name for path in run.iterdir()) == [".lock", "config.yaml", "hf", "metrics.jsonl", "status.json"]
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json"} <= {p.name for p in (run / "hf").iterdir()}


def test_copy_and_edit_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cli.main(["cp", "dllm_jepa_full", "my_recipe.py"])
    cli.main(["cp", "tiny", "my.yaml"])
    recipe = tmp_path / "my_recipe.py"
    loop = "loss = diffusion_loss + cfg.jepa_weight * jepa_loss"
    assert loop in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(loop, "loss = diffusion_loss + 0 * jepa_loss"))
    overrides = ["my.yaml", *SMALL[2:], "max_steps=2"]
    done = command(tmp_path, "tune", "run", "my_recipe.py", "--config", *overrides, "output_dir=edited")
    assert done.returncode == 0, done.stderr
    edited, stock = metrics(tmp_path / "edited"), run_here(tmp_path / "stock", base=["--config", *overrides])
    assert edited[0]["diffusion_loss"] == stock[0]["diffusion_loss"]
    assert edited[0]["grad_norm"] != stock[0]["grad_norm"]


def test_a_bad_config_is_one_message_and_an_exit_code(tmp_path: Path) -> None:
    done = command(tmp_path, "tune", "run", "dllm_jepa_full", "--config", "tiny", "jepa_wieght=1", "seed=-1")
    assert done.returncode == 1
    assert done.stderr.count("error:") == 1
    assert all(word in done.stderr for word in ("jepa_wieght", "jepa_weight", "seed"))
    assert not list(tmp_path.iterdir())
