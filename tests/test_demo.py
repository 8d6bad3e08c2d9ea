"""The demo's scripts: the numbers that a report shows are those of the run's files, and no folder is lost."""

import base64
import html
import importlib
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dllm_jepa.config import Component
from dllm_jepa.data import generate_regex_pairs
from dllm_jepa.errors import ConfigError, LaunchError
from dllm_jepa.evals import nlrx
from dllm_jepa.models import load_hf
from dllm_jepa.models.tiny import tiny_tokenizer
from tests.launching import run_here

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "demo"))  # as `python demo/run.py` does

import compare  # noqa: E402
import figures  # noqa: E402
import launch  # noqa: E402
import report  # noqa: E402
import scoring  # noqa: E402

NUM_STEPS = 60


def metrics_rows() -> list[dict[str, Any]]:
    """Rows as a run writes them, with numbers that are all different."""
    rows = []
    for step in range(1, NUM_STEPS + 1):
        row = {
            "step": step,
            "diffusion_loss": 6.0 - step / 10,
            "jepa_loss": 1.0 / step,
            "grad_norm": 1.0 + 1.0 / step,
            "lr": 1e-3 * step,
            "tokens": 1000 + step,
            "tokens_per_second": 2000.0 + step,
            "step_seconds": 0.5,
        }
        # The lowest band has sequences on every other step only.
        row |= {key: band + step / 100 for band, key in enumerate(figures.BANDS) if band or step % 2}
        if step % 20 == 0:
            row |= {"effective_rank": 30.0 + step, "cosine_diversity": 0.5, "target_cosine": 0.9, "monitor_rows": 192}
        rows.append(row)
    return rows


def write_run(run_dir: Path, **changes: Any) -> dict[str, Any]:
    """A scored run, made of nothing; returns what its scores.json holds."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics_rows()))
    (run_dir / "config.yaml").write_text("seed: 4711\nnote: a < b & c\n")
    canvases = [[None, None, "", None], [None, "dog", "", None], [".*", "dog", "", None], [".*", "dog", "", ""]]
    examples = [
        {"description": "lines with <dog>", "regex": ".*dog", "answer": ".*dog", "correct": True, "canvases": canvases}
    ]
    (run_dir / scoring.EXAMPLES_NAME).write_text(json.dumps(examples))
    generations = [
        {
            "question": f"item {number}",
            "gold": f"x{number}&y",
            "prediction": f"z{number}&y",
            "measures": {"functional_match": number % 3 == 0},
        }
        for number in range(40)
    ]
    (run_dir / scoring.EVAL_NAME).mkdir(exist_ok=True)
    (run_dir / scoring.EVAL_NAME / "generations.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in generations)
    )
    scores = {
        "n": 40,
        "functional_match": 0.35,
        "functional_match_interval": [0.2213, 0.5049],
        "exact_match": 0.325,
        "untrained": 0.025,
        "untrained_interval": [0.0044, 0.1288],
        "constant": 0.075,
        "constant_interval": [0.0258, 0.1986],
        "constant_answer": "(a&b)",
        "train_seconds": 234.0,
        "train_steps": NUM_STEPS,
        "train_tokens": 61830,
        "train_pairs": 12345,
        "parameters": 987654,
        "generation_seconds": 17.0,
        "generation": {"gen_length": 4, "block_length": 4, "steps": 4, "temperature": 0.0},
        "heldout_seed": 1,
        "started_from": None,
        "cpus": 2,
        "threads": 2,
        "torch": "2.0",
        "command": "tune run dllm_jepa_full --config tiny key=1&2",
    } | changes
    (run_dir / scoring.SCORES_NAME).write_text(json.dumps(scores))
    return scores


def rows_of(page: str) -> list[list[str]]:
    """Text of the cells of every table row."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", page, re.S)
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S) for row in rows]
    return [
        [html.unescape(re.sub("<[^>]*>", "", cell)).strip().replace("\N{NO-BREAK SPACE}", " ") for cell in row]
        for row in cells
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run_dir = tmp_path_factory.mktemp("run")
    write_run(run_dir)
    return run_dir, report.write_report(run_dir).read_text()


def test_the_report_shows_the_scores_of_the_files(page: tuple[Path, str]) -> None:
    _, text = page
    rows = rows_of(text)
    assert ["the trained model", "35.0 %", "22.1 % to 50.5 %", "40"] in rows
    assert ["the untrained model", "2.5 %", "0.4 % to 12.9 %", "40"] in rows
    assert ["the best constant answer, (a&b)", "7.5 %", "2.6 % to 19.9 %", "40"] in rows
    words = " ".join(html.unescape(re.sub("<[^>]*>", " ", text)).split())
    for shown in (
        "with 987,654 parameters",
        "12,345 generated pairs",
        "60 steps in 3 min 54 s on 2 CPU threads",
        "For 14 of 40 held-out descriptions",
        "tune run dllm_jepa_full --config tiny key=1&2",
        "note: a < b & c",
        "61,830 tokens trained on; 40 answers generated in 17 s",
        "of the last 192 pooled embeddings",
        "the trained model has 32.5 %",
    ):
        assert shown in words


def test_a_report_on_fine_tuning_without_jepa_and_monitor(tmp_path: Path) -> None:
    """It names its start, and has no curves of what was not measured."""
    write_run(tmp_path, started_from="runs/demo/hf", untrained=0.5)
    monitored = ("effective_rank", "cosine_diversity", "target_cosine", "monitor_rows")
    rows = [{key: value for key, value in row.items() if key not in monitored} for row in metrics_rows()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = report.write_report(tmp_path).read_text()
    assert "from <code>runs/demo/hf</code>" in text
    assert ["the model before this training", "50.0 %", "0.4 % to 12.9 %", "40"] in rows_of(text)
    assert {path.stem for path in tmp_path.glob("*.png")} == {"losses", "learning_rate", "tokens_per_second"}


def test_the_report_shows_wrong_answers_and_counts_them(page: tuple[Path, str]) -> None:
    rows = rows_of(page[1])
    wrong = [number for number in range(40) if number % 3]
    assert [row for row in rows if row[0].startswith("item")] == [
        [f"item {number}", f"x{number}&y", f"z{number}&y"] for number in wrong[: report.NUM_MISTAKES]
    ]
    assert "The first 10 of 26" in page[1]


def test_the_steps_of_an_example(page: tuple[Path, str]) -> None:
    _, text = page
    table = text[text.index('class="canvas">') :]
    table = table[: table.index("</table>")]
    assert rows_of(table) == [
        ["0", "\u00b7", "\u00b7", "\u00b7"],
        ["1", "\u00b7", "\u00b7", "end"],
        ["2", "\u00b7", "dog", "end"],
        ["3", ".*", "dog", "end"],
    ]  # the fourth step fills what stands behind the end
    assert re.findall(r'<td class="new">(.*?)</td>', table) == ["end", "dog", ".*"]
    assert "lines with &lt;dog&gt;" in text


def test_pictures_are_embedded_and_written(page: tuple[Path, str]) -> None:
    run_dir, text = page
    embedded = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]
    assert sorted(embedded) == sorted(path.read_bytes() for path in run_dir.glob("*.png"))
    assert len(embedded) == 5 and all(data.startswith(b"\x89PNG") for data in embedded)
    assert not re.search(r'(src|href)="(?!data:)', text)  # nothing is fetched


def line_data(figure: Any, panel: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in figure.axes[panel].lines]


def test_curves_hold_the_values_of_the_metrics() -> None:
    rows = metrics_rows()
    steps = np.arange(1, NUM_STEPS + 1)
    bands = line_data(figures.losses_by_ratio(rows))
    assert [len(x) for x, _ in bands] == [NUM_STEPS // 2] + [NUM_STEPS] * 4
    width = figures.window(rows)
    for band, (x, y) in enumerate(bands):
        values = band + x / 100
        expected = [values[max(0, i - width + 1) : i + 1].mean() for i in range(len(x))]
        np.testing.assert_allclose(y, expected)
    (x, y), _ = line_data(figures.alignment(rows))
    np.testing.assert_allclose((x, y), (steps, 1.0 / steps))
    ((x, y),) = line_data(figures.alignment(rows), 1)
    np.testing.assert_allclose((x, y), ([20, 40, 60], [0.9] * 3))
    ((x, y),) = line_data(figures.collapse(rows))
    np.testing.assert_allclose((x, y), ([20, 40, 60], [50, 70, 90]))
    assert "192 rows" in figures.collapse(rows).axes[0].get_title(loc="left")
    np.testing.assert_allclose(line_data(figures.speed(rows))[0], (steps, 2000 + steps))
    np.testing.assert_allclose(line_data(figures.rate_and_gradient(rows))[0], (steps, 1e-3 * steps))


def test_the_table_of_student_t() -> None:
    for degrees in range(1, 10):
        # One 1 among zeros has the standard error 1 / (degrees + 1).
        quantile = (report.t_interval([0.0] * degrees + [1.0])[1] - 1 / (degrees + 1)) * (degrees + 1)
        x = np.linspace(0, quantile, 20_001)
        density = (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
        norm = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
        assert 0.5 + norm * np.trapezoid(density, x) == pytest.approx(0.975, abs=2e-5)


def test_a_comparison_shows_means_intervals_and_paired_differences(tmp_path: Path) -> None:
    shares = {"base": (0.50, 0.54), "more": (0.60, 0.65), "same": (0.49, 0.56)}
    for name, values in shares.items():
        for seed, share in enumerate(values):
            write_run(tmp_path / f"{name}{seed}", functional_match=share, command=f"train {name} {seed}")

    def arms(seeds: list[int]) -> list[report.Arm]:
        return [report.Arm(name, [tmp_path / f"{name}{seed}" for seed in seeds]) for name in shares]

    text = report.write_comparison(tmp_path, arms([0, 1]), [0, 1]).read_text()
    rows = rows_of(text)
    # With two seeds the interval is the mean +- 12.706 * half their distance.
    assert ["base", "50.0 %", "54.0 %", "52.0 %", "26.6 % to 77.4 %", "3 min 54 s"] in rows
    assert ["untrained", "2.5 %", "2.5 %", "", "", ""] in rows
    assert ["more minus base", "+10.5", "+4.1 to +16.9", "higher"] in rows
    assert ["same minus base", "+0.5", "-18.6 to +19.6", "no difference shown"] in rows
    assert ["same minus more", "-10.0", "-22.7 to +2.7", "no difference shown"] in rows
    assert all(f"train {name} {seed}" in text for name in shares for seed in (0, 1))
    assert {path.name for path in tmp_path.glob("*.png")} == {"scores.png", "losses.png"}
    rows = rows_of(report.write_comparison(tmp_path, arms([0]), [0]).read_text())
    assert ["more", "60.0 %", "60.0 %", "needs 2 seeds", "3 min 54 s"] in rows
    assert ["more minus base", "+10.0", "needs 2 seeds", "one seed: nothing can be said"] in rows


@pytest.fixture(scope="module")
def scored_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run, scored as the demo does but in this process."""
    run_dir = tmp_path_factory.mktemp("scored") / "run"
    run_here(run_dir, "export=online", "max_steps=2", "dataset.canvas_tokens=8", "dataset.task=second")

    def in_this_process(recipe: str, arguments: list[str]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [recipe, *arguments])
            importlib.import_module(recipe).recipe_main()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "launch", in_this_process)
        scoring.score_run(run_dir, num_items=12, command="the command")
    return run_dir


def test_scores_are_those_of_the_evaluations(scored_run: Path) -> None:
    scores = report.read_scores(scored_run)
    folder = scored_run / scoring.EVAL_NAME
    for name, path in (("functional_match", folder), ("untrained", folder / "base")):
        rows = scoring.read_rows(path)
        correct = sum(row["measures"]["functional_match"] for row in rows)
        assert len(rows) == scores["n"] == 12
        assert (scores[name], scores[f"{name}_interval"]) == (correct / 12, [*scoring.wilson_interval(correct, 12)])
    golds = [row["gold"] for row in scoring.read_rows(folder)]
    same = sum(nlrx.equivalent(scores["constant_answer"], gold) for gold in golds)
    assert scores["constant"] == same / 12 > 0
    assert scores["generation"] == {"gen_length": 8, "block_length": 8, "steps": 8}
    assert (scores["train_steps"], scores["train_pairs"], scores["command"]) == (2, 60, "the command")
    assert scores["parameters"] == sum(param.numel() for param in load_hf(scored_run / "hf").parameters())
    report.write_report(scored_run)


def test_the_items_are_held_out_and_those_of_the_task(scored_run: Path) -> None:
    pairs = generate_regex_pairs(num_pairs=12, seed=scoring.HELDOUT_SEED, split="heldout", task="second")
    rows = scoring.read_rows(scored_run / scoring.EVAL_NAME)
    assert [(row["question"], row["gold"]) for row in rows] == [(pair["description"], pair["regex"]) for pair in pairs]
    chats = [tiny_tokenizer().encode_chat([{"role": "user", "content": row["question"]}], add_generation_prompt=True)[0]
             for row in rows]  # fmt: skip
    assert [row["prompt"] for row in rows] == [tiny_tokenizer().decode(ids, skip_special_tokens=False) for ids in chats]


def test_examples_show_every_step(scored_run: Path) -> None:
    examples = json.loads((scored_run / scoring.EXAMPLES_NAME).read_text())
    rows = {row["question"]: row for row in scoring.read_rows(scored_run / scoring.EVAL_NAME)}
    assert examples
    for example in examples:
        row = rows[example["description"]]
        assert (example["regex"], example["answer"]) == (row["gold"], row["prediction"])
        last = example["canvases"][-1]
        assert "".join(last[: last.index("")] if "" in last else last) == example["answer"]
        assert [canvas.count(None) for canvas in example["canvases"]] == list(range(len(last) - 1, -1, -1))


def test_the_model_before_training(scored_run: Path, tmp_path: Path) -> None:
    before = load_hf(scored_run / "before").state_dict()
    run_here(tmp_path / "run", "export=online", "max_steps=1", "optimizer.lr=0.0", "lr_scheduler=null")
    initial = load_hf(tmp_path / "run" / "hf").state_dict()  # of the same seed
    assert all(torch.equal(before[name], initial[name]) for name in initial)
    assert scoring.model_before_training(SimpleNamespace(checkpoint_dir="llada"), tmp_path) == Path("llada")


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("dllm_jepa.data.gsm8k", {}, "only runs on dllm_jepa.data.regex_pairs can be scored, not dllm_jepa.data.gsm8k"),
        ("dllm_jepa.data.regex_pairs", {"canvas_tokens": None}, "set dataset.canvas_tokens"),
    ],
)
def test_runs_that_cannot_be_scored(tmp_path: Path, path: str, arguments: dict[str, Any], message: str) -> None:
    cfg = SimpleNamespace(dataset=Component(path, arguments))
    with pytest.raises(ConfigError, match=message):
        scoring.evaluation(cfg, tmp_path, 12)


def test_only_a_marked_folder_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs/demo"
    launch.claim_folder(folder)
    assert capsys.readouterr().out == ""
    (folder / "mine").write_text("old")
    launch.claim_folder(folder, keep=True)
    assert (folder / "mine").exists()
    launch.claim_folder(folder)
    assert "of an earlier demo and is removed" in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == [launch.MARKER_NAME]
    (folder / launch.MARKER_NAME).rename(folder / "mine")
    for path in (folder, folder / "mine"):
        with pytest.raises(LaunchError, match="was not written by this script.*--output"):
            launch.claim_folder(path, keep=True)
    assert [path.name for path in folder.iterdir()] == ["mine"]


def test_a_failed_training_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(LaunchError, match="make install"):
        launch.launch("dllm_jepa_full", ["--config", "tiny"])
    tune = tmp_path / "tune"
    tune.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\nexit 3\n')
    tune.chmod(0o755)
    with pytest.raises(LaunchError, match="exit code 3"):
        launch.launch("dllm_jepa_full", ["--config", "tiny", "seed=1"])
    assert (
        f"tune {(tmp_path / 'words').read_text()}".split()
        == launch.command_line("dllm_jepa_full", ["--config", "tiny", "seed=1"]).split()
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces training and scoring by stand-ins that leave the files; notes what was called."""
    calls = []

    def train(recipe: str, arguments: list[str]) -> None:
        assert recipe == "dllm_jepa_full"
        run_dir = Path(next(word for word in arguments if word.startswith("output_dir=")).partition("=")[2])
        calls.append(f"train {run_dir.name}")
        (run_dir / "hf").mkdir()

    def score_run(run_dir: Path, *, num_items: int, command: str) -> None:
        calls.append(f"score {run_dir.name}")
        write_run(run_dir, n=num_items, command=command)

    monkeypatch.setattr(compare, "launch", train)
    monkeypatch.setattr(compare, "score_run", score_run)
    return calls


def test_a_comparison_goes_on_where_it_stopped(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "compare"
    names = ["diffusion_seed3", "jepa_seed3", "shuffled_seed3"]
    compare.compare(folder, [3], 40, ["max_steps=2"])
    assert calls == [f"{verb} {name}" for name in names for verb in ("train", "score")]
    assert (folder / report.REPORT_NAME).exists()
    monkeypatch.setattr(compare, "write_comparison", lambda output, arms, seeds: output)  # drawing takes its time
    calls.clear()
    compare.compare(folder, [3], 40, ["max_steps=2"])
    assert calls == []
    (folder / names[0] / scoring.SCORES_NAME).unlink()  # stopped while scoring
    (folder / names[2] / "hf").rmdir()  # stopped while training
    compare.compare(folder, [3], 40, ["max_steps=2"])
    assert calls == [f"score {names[0]}", f"train {names[2]}", f"score {names[2]}"]
    calls.clear()
    compare.compare(folder, [3], 50, ["max_steps=2"])
    assert calls == [f"score {name}" for name in names]
    assert "max_steps=2 jepa_weight=1 shuffle_targets=true seed=3" in (folder / names[2] / "command.txt").read_text()


def test_runs_that_cannot_be_compared(tmp_path: Path, calls: list[str]) -> None:
    for seeds in ([], [1, 1], list(range(11))):
        with pytest.raises(LaunchError, match="between 1 and 10 different seeds"):
            compare.compare(tmp_path / "compare", seeds, 40, [])
    assert not (tmp_path / "compare").exists()
    compare.compare(tmp_path, [3], 40, ["max_steps=2"])
    calls.clear()
    with pytest.raises(LaunchError, match="(?s)made by.*max_steps=2.*not by.*max_steps=9"):
        compare.compare(tmp_path, [3], 40, ["max_steps=9"])
    assert calls == []
