"""Score an exported model on held-out descriptions: exact match of the generated regex.

Run from a clone; shared by run.py and compare.py.

Shape legend: G tokens of a canvas.
"""

import json
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune.config import instantiate

from dllm_jepa.data import generate_regex_pairs
from dllm_jepa.errors import ConfigError
from dllm_jepa.generation import BlockDecoding, DenoisingModel
from dllm_jepa.models import InitialWeights, MaskedDiffusionLM, Tokenizer, load_hf

HELDOUT_SEED = 1
NUM_EXAMPLES = 4
BATCH_SIZE = 100
SCORES_NAME = "scores.json"
EXAMPLES_NAME = "examples.json"
GENERATIONS_NAME = "generations.jsonl"


@dataclass(frozen=True)
class Item:
    """A held-out question.

    Args:
        description: what stands in the prompt.
        regex: the expected answer.
        prompt: token ids in front of the answer.
    """

    description: str
    regex: str
    prompt: list[int]


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Args:
        text: the text up to the end of the answer.
        canvases: ids on the canvas after every step, each of length G.
    """

    text: str
    canvases: list[list[int]]


def heldout_items(cfg: DictConfig, tokenizer: Tokenizer, num_items: int) -> list[Item]:
    """Held-out questions in the prompts of training; no regex of theirs, nor an equal one, is in any training set.

    Args:
        cfg: config of the run.
        tokenizer: its tokenizer.
        num_items: number of items.
    """
    if cfg.dataset["_component_"] != "dllm_jepa.data.regex_pairs":
        raise ConfigError(f"only runs on dllm_jepa.data.regex_pairs can be scored, not {cfg.dataset['_component_']}")
    task = cfg.dataset.get("task", "first")
    pairs = generate_regex_pairs(num_pairs=num_items, seed=HELDOUT_SEED, split="heldout", task=task)
    # The same draw once more, as a dataset: its prompts are those of training, whatever the template.
    dataset_cfg = OmegaConf.merge(cfg.dataset, {"num_pairs": num_items, "seed": HELDOUT_SEED, "split": "heldout"})
    dataset = instantiate(dataset_cfg, tokenizer, max_seq_len=cfg.max_seq_len, shift_logits=False, progress=False)
    prompts = (tokens[: int(maskable.argmax())].tolist() for tokens, maskable in dataset)
    return [Item(pair["description"], pair["regex"], prompt) for pair, prompt in zip(pairs, prompts, strict=True)]


def answer(model: DenoisingModel, tokenizer: Tokenizer, items: Sequence[Item], decoding: BlockDecoding) -> list[Answer]:
    """Generate the answers, in the order of the items."""
    answers = []
    for start in range(0, len(items), BATCH_SIZE):
        generation = decoding.generate(
            model,
            [item.prompt for item in items[start : start + BATCH_SIZE]],
            mask_id=tokenizer.mask_id,
            pad_id=tokenizer.pad_id,
            token_ids=tokenizer.token_ids,
            trace=True,
        )
        for canvases in torch.stack(generation.trace, dim=1).tolist():
            answers.append(Answer(read_answer(tokenizer, canvases[-1]), canvases))
    return answers


def end_ids(tokenizer: Tokenizer) -> set[int]:
    """Ids that end an answer: end of text, and end of turn."""
    tokens, response = tokenizer.encode_chat([{"role": "assistant", "content": ""}])
    return {tokenizer.eos_id, *(token for token, is_response in zip(tokens, response, strict=True) if is_response)}


def read_answer(tokenizer: Tokenizer, canvas: Sequence[int]) -> str:
    """The text of a canvas up to the first token that ends an answer; other special tokens stay visible."""
    ends = end_ids(tokenizer)
    length = next((index for index, token in enumerate(canvas) if token in ends), len(canvas))
    return tokenizer.decode(canvas[:length], skip_special_tokens=False)


def wilson_interval(num_correct: int, num_items: int, z: float = 1.959964) -> tuple[float, float]:
    """Interval of a share, 95 % for the default z.

    Returns:
        Lower and upper bound, fractions in [0, 1].

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    share = num_correct / num_items
    centre = share + z * z / (2 * num_items)
    half = z * math.sqrt(share * (1 - share) / num_items + z * z / (4 * num_items * num_items))
    scale = 1 + z * z / num_items
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def best_constant(items: Sequence[Item]) -> tuple[str, int]:
    """The one answer to every question that is right most often, and how often it is.

    It is picked on the held-out items themselves, so no constant does better. (The most frequent regex of the training
    set is right never: the sets have no regex in common.)
    """
    return Counter(item.regex for item in items).most_common(1)[0]


def model_before_training(cfg: DictConfig) -> MaskedDiffusionLM:
    """The model that a run started from: its checkpoint, or its random initial weights."""
    if cfg.checkpoint_dir is not None:
        return load_hf(cfg.checkpoint_dir)
    model: MaskedDiffusionLM = instantiate(cfg.model)
    initial = InitialWeights(model, seed=cfg.seed, num_layers=model.sizes.num_layers)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(initial.read(name))
    return model.eval()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl, one per optimizer step."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def score_run(run_dir: Path, *, num_items: int, command: str) -> dict[str, Any]:
    """Score a finished run; writes scores.json, generations.jsonl and examples.json into its folder.

    Args:
        run_dir: output_dir of the run.
        num_items: held-out items.
        command: how it was trained, for the report.

    Returns:
        What scores.json holds; shares are fractions in [0, 1].
    """
    cfg = OmegaConf.load(run_dir / "config.yaml")
    assert isinstance(cfg, DictConfig)
    export = run_dir / "hf"
    tokenizer: Tokenizer = instantiate(OmegaConf.merge(cfg.tokenizer, {"path": str(export)}))
    if cfg.dataset.get("canvas_tokens") is None:
        raise ConfigError("set dataset.canvas_tokens: the model generates on a canvas of the length it was trained on")
    length = int(cfg.dataset.canvas_tokens)
    decoding = BlockDecoding(gen_length=length, block_length=length, steps=length)
    items = heldout_items(cfg, tokenizer, num_items)
    model = load_hf(export)
    start = time.perf_counter()
    answers = answer(model, tokenizer, items, decoding)
    seconds = time.perf_counter() - start
    before = answer(model_before_training(cfg), tokenizer, items, decoding)

    constant, constant_correct = best_constant(items)
    metrics = read_metrics(run_dir)
    scores: dict[str, Any] = {"n": num_items}
    for name, num_correct in (
        ("exact_match", _count_correct(items, answers)),
        ("untrained", _count_correct(items, before)),
        ("constant", constant_correct),
    ):
        scores[name] = num_correct / num_items
        scores[f"{name}_interval"] = wilson_interval(num_correct, num_items)
    scores |= {
        "constant_answer": constant,
        "train_seconds": sum(row["step_seconds"] for row in metrics),
        "train_steps": len(metrics),
        "train_tokens": sum(row["tokens"] for row in metrics),
        "train_pairs": cfg.dataset.num_pairs,
        "parameters": sum(param.numel() for param in model.parameters()),
        "generation_seconds": seconds,
        "generation": {"gen_length": length, "block_length": length, "steps": length, "temperature": 0.0},
        "heldout_seed": HELDOUT_SEED,
        "started_from": cfg.checkpoint_dir,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "command": command,
    }
    _write_generations(run_dir, items, answers, before)
    (run_dir / EXAMPLES_NAME).write_text(json.dumps(_examples(tokenizer, items, answers), indent=1) + "\n", "utf-8")
    # Last: a folder with this file holds a run that is scored completely.
    (run_dir / SCORES_NAME).write_text(json.dumps(scores, indent=2) + "\n", "utf-8")
    return scores


def _count_correct(items: Sequence[Item], answers: Sequence[Answer]) -> int:
    return sum(item.regex == answer.text for item, answer in zip(items, answers, strict=True))


def _write_generations(
    run_dir: Path, items: Sequence[Item], answers: Sequence[Answer], before: Sequence[Answer]
) -> None:
    with (run_dir / GENERATIONS_NAME).open("w", encoding="utf-8") as file:
        for item, after, untrained in zip(items, answers, before, strict=True):
            row = {
                "description": item.description,
                "regex": item.regex,
                "answer": after.text,
                "correct": after.text == item.regex,
                "untrained": untrained.text,
            }
            file.write(json.dumps(row) + "\n")


def _examples(tokenizer: Tokenizer, items: Sequence[Item], answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The first correct items and the first wrong one, with every step; None stands for a mask."""
    pairs = list(zip(items, answers, strict=True))
    correct = [pair for pair in pairs if pair[0].regex == pair[1].text]
    wrong = [pair for pair in pairs if pair[0].regex != pair[1].text]
    shown = correct[: NUM_EXAMPLES - 1] + wrong[:1]
    names = {token: "" for token in end_ids(tokenizer)}

    def text(token: int) -> str | None:
        if token == tokenizer.mask_id:
            return None
        return names.get(token, tokenizer.decode([token], skip_special_tokens=False))

    return [
        {
            "description": item.description,
            "regex": item.regex,
            "answer": answer.text,
            "correct": item.regex == answer.text,
            "canvases": [[text(token) for token in canvas] for canvas in answer.canvases],
        }
        for item, answer in shown
    ]
