"""Reports as one HTML file with its pictures inside, made from the files of a run and nothing else.

    python demo/report.py runs/demo

writes report.html and the curves as PNG into the folder again.
"""

import base64
import io
import itertools
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import figures
import jinja2
from matplotlib.figure import Figure
from scoring import EVAL_NAME, EXAMPLES_NAME, MEASURE, SCORES_NAME, read_metrics, read_rows

from dllm_jepa.evals import wilson_interval

REPORT_NAME = "report.html"
NUM_MISTAKES = 10

# Two-sided 95 % quantiles of Student's t, for 1 to 9 degrees of freedom.
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MAX_SEEDS = len(_T_95) + 1


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seeds alone, in the same order for all arms."""

    name: str
    runs: Sequence[Path]


def write_report(run_dir: Path) -> Path:
    """Write report.html and its curves for a scored run; returns the path of the report."""
    rows, scores = read_metrics(run_dir), read_scores(run_dir)
    generations = read_rows(run_dir / EVAL_NAME)
    before = "the model before this training" if scores["started_from"] else "the untrained model"
    page = _environment().get_template("run.html")
    html = page.render(
        scores=scores,
        correct=round(scores[MEASURE] * scores["n"]),
        score_rows=[
            _score_row("the trained model", scores, MEASURE),
            _score_row(before, scores, "untrained"),
            _score_row("the best constant answer,", scores, "constant", scores["constant_answer"]),
        ],
        examples=[_example(example) for example in json.loads((run_dir / EXAMPLES_NAME).read_text("utf-8"))],
        mistakes=[row for row in generations if not row["measures"][MEASURE]][:NUM_MISTAKES],
        generations_name=f"{EVAL_NAME}/generations.jsonl",
        figures=_run_figures(run_dir, rows),
        config=(run_dir / "config.yaml").read_text("utf-8"),
    )
    report = run_dir / REPORT_NAME
    report.write_text(html, "utf-8")
    return report


def write_comparison(output_dir: Path, arms: Sequence[Arm], seeds: Sequence[int]) -> Path:
    """Write report.html and its curves for scored runs of several arms, the baseline first; returns its path."""
    scores = {arm.name: [read_scores(run) for run in arm.runs] for arm in arms}
    shares = {name: [float(score[MEASURE]) for score in found] for name, found in scores.items()}
    intervals = {name: t_interval(values) for name, values in shares.items()}
    num_items = {score["n"] for found in scores.values() for score in found}
    assert len(num_items) == 1, f"the runs were scored on different numbers of items: {num_items}"
    (items,) = num_items
    widths = [
        high - low for low, high in (wilson_interval(round(s * items), items) for v in shares.values() for s in v)
    ]
    html = (
        _environment()
        .get_template("compare.html")
        .render(
            num_seeds=len(seeds),
            seeds=seeds,
            num_items=items,
            wilson_half=statistics.mean(widths) / 2,
            arms=[
                {
                    "name": name,
                    "shares": shares[name],
                    "mean": statistics.mean(shares[name]),
                    "interval": intervals[name],
                    "seconds": statistics.mean(score["train_seconds"] for score in found),
                }
                for name, found in scores.items()
            ],
            untrained=[score["untrained"] for score in scores[arms[0].name]],
            constant=[score["constant"] for score in scores[arms[0].name]],
            differences=[_difference(one, other, shares) for one, other in itertools.combinations(shares, 2)],
            figures=_comparison_figures(output_dir, arms, shares, intervals),
            commands=[score["command"] for found in scores.values() for score in found],
        )
    )
    report = output_dir / REPORT_NAME
    report.write_text(html, "utf-8")
    return report


def read_scores(run_dir: Path) -> dict[str, Any]:
    """What scores.json holds."""
    scores: dict[str, Any] = json.loads((run_dir / SCORES_NAME).read_text("utf-8"))
    return scores


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of a mean over at most `MAX_SEEDS` values; None for a single one."""
    if len(values) < 2:
        return None
    half = _T_95[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.mean(values)
    return mean - half, mean + half


def _difference(baseline: str, name: str, shares: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The second arm minus the first one, paired by seed."""
    values = [after - before for before, after in zip(shares[baseline], shares[name], strict=True)]
    interval = t_interval(values)
    if interval is None:
        reading = "one seed: nothing can be said"
    elif interval[0] <= 0 <= interval[1]:
        reading = "no difference shown"
    else:
        reading = "higher" if interval[0] > 0 else "lower"
    return {
        "name": f"{name} minus {baseline}",
        "mean": statistics.mean(values),
        "interval": interval,
        "reading": reading,
    }


def _score_row(label: str, scores: Mapping[str, Any], key: str, code: str = "") -> dict[str, Any]:
    return {"label": label, "code": code, "share": scores[key], "interval": scores[f"{key}_interval"]}


def _example(example: Mapping[str, Any]) -> dict[str, Any]:
    """The steps of an example that change what is shown: the answer, and the token that ends it."""
    canvases = example["canvases"]
    end = canvases[-1].index("") + 1 if "" in canvases[-1] else len(canvases[-1])
    before: list[str | None] = [None] * end
    rows = [{"step": 0, "cells": [_cell(None, None)] * end}]
    for step, canvas in enumerate(canvases, start=1):
        if canvas[:end] != before:
            cells = [_cell(token, earlier) for token, earlier in zip(canvas[:end], before, strict=True)]
            rows.append({"step": step, "cells": cells})
        before = canvas[:end]
    return dict(example) | {"rows": rows}


def _cell(token: str | None, earlier: str | None) -> dict[str, str]:
    if token is None:
        return {"text": "\N{MIDDLE DOT}", "kind": "masked"}
    if earlier is None:
        return {"text": token or "end", "kind": "new"}
    return {"text": token, "kind": "kept"} if token else {"text": "end", "kind": "end"}


def _run_figures(run_dir: Path, rows: figures.Rows) -> list[dict[str, str]]:
    """Draw the curves of a run and save them as PNG."""
    width = figures.window(rows)
    mean = f"moving average over {width} steps" if width > 1 else "every step"
    drawn = [
        ("losses", figures.losses_by_ratio(rows), f"Loss of the masked tokens by how much was masked ({mean})."),
        (
            "jepa",
            figures.alignment(rows),
            f"JEPA loss (thin: every step; thick: {mean}) and its cosine where measured.",
        ),
        ("collapse", figures.collapse(rows), _collapse_caption(rows)),
        ("learning_rate", figures.rate_and_gradient(rows), "Learning rate, and gradient norm."),
        ("tokens_per_second", figures.speed(rows), f"Speed (thin: every step; thick: {mean})."),
    ]
    return [_save(run_dir, name, figure, caption) for name, figure, caption in drawn if figure is not None]


def _collapse_caption(rows: figures.Rows) -> str:
    _, counts = figures.series(rows, "monitor_rows")
    if not len(counts):
        return ""
    return (
        f"Effective rank of the last {figures.rows_measured(rows)} pooled embeddings, a number that bounds it, and "
        "their diversity, 1 minus the mean cosine of two of them. A collapse would show as a fall to 1 and to 0."
    )


def _comparison_figures(
    output_dir: Path,
    arms: Sequence[Arm],
    shares: Mapping[str, Sequence[float]],
    intervals: Mapping[str, tuple[float, float] | None],
) -> list[dict[str, str]]:
    metrics = {arm.name: [read_metrics(run) for run in arm.runs] for arm in arms}
    return [
        _save(
            output_dir,
            "scores",
            figures.scores_by_arm(shares, intervals),
            "Functional match. Dots: seeds. Thick line: their mean. Thin line: its 95 % interval.",
        ),
        _save(
            output_dir,
            "losses",
            figures.diffusion_losses(metrics),
            "Diffusion loss, without the JEPA loss. Line: mean over the seeds; shade: from the lowest to the highest.",
        ),
    ]


def _save(folder: Path, name: str, figure: Figure, caption: str) -> dict[str, str]:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    (folder / f"{name}.png").write_bytes(buffer.getvalue())
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"source": f"data:image/png;base64,{encoded}", "alt": caption, "caption": caption}


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}\N{NO-BREAK SPACE}%"
    environment.filters["signed"] = lambda share: f"{100 * share:+.1f}"
    environment.filters["points"] = lambda share: f"{100 * share:.1f}"
    environment.filters["duration"] = _duration
    return environment


def _duration(seconds: float) -> str:
    if seconds < 120:
        text = f"{seconds:.0f} s"
    else:
        minutes, rest = divmod(round(seconds), 60)
        text = f"{minutes} min {rest} s"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


if __name__ == "__main__":
    print(write_report(Path(sys.argv[1])))
