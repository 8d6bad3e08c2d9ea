"""Score an exported model on held-out descriptions with the evaluation recipe, beside the model that it started from.

Run from a clone; shared by run.py and compare.py.

Shape legend: G tokens of a canvas.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from launch import launch

from dllm_jepa.config import load_config, read_config, recipe_config
from dllm_jepa.errors import ConfigError
from dllm_jepa.evals import GenerationTask, wilson_interval
from dllm_jepa.models import InitialWeights, MaskedDiffusionLM, Tokenizer, load_hf, save_hf
from dllm_jepa.trained_model import open_model

HELDOUT_SEED = 1
NUM_EXAMPLES = 4
MEASURE = "functional_match"
SCORES_NAME = "scores.json"
EXAMPLES_NAME = "examples.json"
EVAL_NAME = "eval"


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The objects of an evaluation's generations.jsonl."""
    return [json.loads(line) for line in (folder / "generations.jsonl").read_text(encoding="utf-8").splitlines()]


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl, one per optimizer step."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def model_before_training(cfg: Any, run_dir: Path) -> Path:
    """Directory of the model that a run started from: its checkpoint, or its random initial weights, written here."""
    if cfg.checkpoint_dir is not None:
        return Path(cfg.checkpoint_dir)
    path = run_dir / "before"
    if not path.exists():
        model: MaskedDiffusionLM = cfg.model.build()
        initial = InitialWeights(model, seed=cfg.seed)
        weights = ((name, initial.read(name)) for name, _ in model.named_parameters())
        save_hf(model, path, None, torch.float32, weights=weights, tokenizer=cfg.tokenizer.build())
    return path


def evaluation(cfg: Any, run_dir: Path, num_items: int) -> list[str]:
    """Arguments of the evaluation recipe: held-out pairs of the run's task, in the prompts of its training."""
    data = cfg.dataset.arguments
    if cfg.dataset.path != "dllm_jepa.data.regex_pairs":
        raise ConfigError(f"only runs on dllm_jepa.data.regex_pairs can be scored, not {cfg.dataset.path}")
    if data.get("canvas_tokens") is None:
        raise ConfigError("set dataset.canvas_tokens: the model generates on a canvas of the length it was trained on")
    task = {key: data[key] for key in ("task", "template", "system_prompt") if data.get(key) is not None}
    length = data["canvas_tokens"]
    return [
        *("--config", "tiny_eval", f"output_dir={run_dir / EVAL_NAME}", f"checkpoint_dir={run_dir / 'hf'}"),
        *(f"task.{key}={json.dumps(value)}" for key, value in task.items()),  # "" would be null without quotes
        *(f"task.num_pairs={num_items}", f"task.data_seed={HELDOUT_SEED}"),
        *(f"decoding.{key}={length}" for key in ("gen_length", "block_length", "steps")),
    ]


def score_run(run_dir: Path, *, num_items: int, command: str) -> dict[str, Any]:
    """Score a finished run; writes eval/, scores.json and examples.json into its folder, and returns the scores."""
    cfg: Any = recipe_config("dllm_jepa_full").check(read_config(run_dir / "config.yaml"))
    arguments = evaluation(cfg, run_dir, num_items)
    launch("dllm_jepa_eval", [*arguments, f"base_dir={model_before_training(cfg, run_dir)}", "resume=auto"])
    folder = run_dir / EVAL_NAME
    trained, before = (json.loads((path / SCORES_NAME).read_text("utf-8")) for path in (folder, folder / "base"))
    constant = trained["remarks"]["best_constant"]
    num_constant = round(constant[MEASURE] * num_items)
    metrics = read_metrics(run_dir)
    scores: dict[str, Any] = {
        "n": num_items,
        **_share(MEASURE, trained["scores"][MEASURE]),
        **_share("exact_match", trained["scores"]["exact_match"]),
        **_share("untrained", before["scores"][MEASURE]),
        **_share("constant", {"score": constant[MEASURE], "interval": wilson_interval(num_constant, num_items)}),
        "constant_answer": constant["regex"],
        "train_seconds": sum(row["step_seconds"] for row in metrics),
        "train_steps": len(metrics),
        "train_tokens": sum(row["tokens"] for row in metrics),
        "train_pairs": cfg.dataset.arguments["num_pairs"],
        "generation_seconds": trained["seconds"],
        "generation": {key: trained["config"]["decoding"][key] for key in ("gen_length", "block_length", "steps")},
        "heldout_seed": HELDOUT_SEED,
        "started_from": cfg.checkpoint_dir,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "command": command,
    }
    model = load_hf(run_dir / "hf")
    scores["parameters"] = sum(param.numel() for param in model.parameters())
    tokenizer = open_model(run_dir / "hf").tokenizer()
    evaluated = recipe_config("dllm_jepa_eval").check(load_config(arguments))
    examples = _examples(model, tokenizer, evaluated, read_rows(folder))
    (run_dir / EXAMPLES_NAME).write_text(json.dumps(examples, indent=1) + "\n", "utf-8")
    # Last: a folder with this file holds a run that is scored completely.
    (run_dir / SCORES_NAME).write_text(json.dumps(scores, indent=2) + "\n", "utf-8")
    return scores


def _share(name: str, measure: Mapping[str, Any]) -> dict[str, Any]:
    return {name: measure["score"], f"{name}_interval": measure["interval"]}


def _examples(
    model: MaskedDiffusionLM, tokenizer: Tokenizer, cfg: Any, rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The first correct items and the first wrong one, generated once more with every step; None stands for a mask."""
    correct = [row for row in rows if row["measures"][MEASURE]]
    wrong = [row for row in rows if not row["measures"][MEASURE]]
    shown = correct[: NUM_EXAMPLES - 1] + wrong[:1]
    decoding = cfg.decoding.build()
    task: GenerationTask = cfg.task.build(tokenizer, decoding, progress=False)
    generation = decoding.generate(
        model,
        [task.prompts[row["item"]] for row in shown],
        mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id,
        token_ids=tokenizer.token_ids,
        trace=True,
    )

    def text(token: int) -> str | None:
        if token == tokenizer.mask_id:
            return None
        return "" if token in tokenizer.end_ids else tokenizer.decode([token], skip_special_tokens=False)

    return [
        {
            "description": task.rows[row["item"]].values["description"],
            "regex": row["gold"],
            "answer": row["prediction"],
            "correct": bool(row["measures"][MEASURE]),
            "canvases": [[text(token) for token in canvas[number].tolist()] for canvas in generation.trace],
        }
        for number, row in enumerate(shown)
    ]
