"""Generated tokens per second of the decoding modes, with the score of each, on an exported demo model.

    python benchmarks/generation.py runs/demo/hf [--items 200] [--batch-size 50] [--canvas 24] [--block 8] [--repeats 3]

The model answers held-out descriptions in the chat format, as `make demo` trains it to; the canvas should be as long as
the run's dataset.canvas_tokens. Modes take turns, and the median time counts; tokens are those in front of the first
end of text or turn. Prints one JSON line a mode and a table last.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _machine import describe_machine

from dllm_jepa.data import format_prompt, generate_regex_pairs
from dllm_jepa.evals import nlrx, wilson_interval
from dllm_jepa.generation import Decoding, Generation, llada_decoding
from dllm_jepa.models import MaskedDiffusionLM, Tokenizer
from dllm_jepa.trained_model import open_model

HELDOUT_SEED = 1
EXACT = "exact"
# (name, prompts at once: one or a batch, arguments of the decoding)
MODES: tuple[tuple[str, bool, dict[str, Any]], ...] = (
    (f"{EXACT}, one by one", False, {}),
    (EXACT, True, {}),
    ("prefix cache", True, {"cache": "prefix"}),
    ("dual cache", True, {"cache": "dual"}),
    ("threshold 0.9", True, {"threshold": 0.9}),
    ("prefix cache, threshold 0.9", True, {"cache": "prefix", "threshold": 0.9}),
    ("dual cache, threshold 0.9", True, {"cache": "dual", "threshold": 0.9}),
)


@dataclass(frozen=True)
class Items:
    """Held-out questions.

    Args:
        prompts: token ids in front of each answer.
        answers: the expected answers.
    """

    prompts: list[list[int]]
    answers: list[str]


def heldout_items(tokenizer: Tokenizer, num_items: int) -> Items:
    """Held-out pairs in the prompts of training."""
    pairs = generate_regex_pairs(num_pairs=num_items, seed=HELDOUT_SEED, split="heldout")
    prompts = [format_prompt(tokenizer, system="", question=pair["description"], template="chat") for pair in pairs]
    return Items(prompts, [pair["regex"] for pair in pairs])


def generate(
    model: MaskedDiffusionLM, tokenizer: Tokenizer, decoding: Decoding, prompts: list[list[int]], batch_size: int
) -> tuple[float, list[Generation]]:
    """Generate for all prompts; seconds and what came out."""
    device = next(model.parameters()).device
    start = time.perf_counter()
    generations = [
        decoding.generate(
            model,
            prompts[first : first + batch_size],
            mask_id=tokenizer.mask_id,
            pad_id=tokenizer.pad_id,
            token_ids=tokenizer.token_ids,
            stop_ids=tokenizer.end_ids,
            device=device,
        )
        for first in range(0, len(prompts), batch_size)
    ]
    return time.perf_counter() - start, generations  # the counts of tokens have waited for the device


def measure(
    name: str, decoding: Decoding, runs: list[tuple[float, list[Generation]]], items: Items, tokenizer: Tokenizer
) -> dict[str, Any]:
    """What is printed of a mode; time is the median of its runs, which all gave the same tokens."""
    generations = runs[0][1]
    canvases = [row for generation in generations for row in generation.canvas.tolist()]
    lengths = [length for generation in generations for length in generation.num_tokens]
    passes = [count for generation in generations for count in generation.num_passes]
    texts = [
        tokenizer.decode(canvas[:length], skip_special_tokens=False)
        for canvas, length in zip(canvases, lengths, strict=True)
    ]
    num_correct = sum(map(nlrx.equivalent, texts, items.answers))
    seconds = statistics.median(seconds for seconds, _ in runs)
    return {
        "mode": name,
        "items": len(texts),
        "tokens": sum(lengths),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(sum(lengths) / seconds, 1),
        "passes_per_item": round(statistics.mean(passes), 2),
        "functional_match": round(num_correct / len(texts), 4),
        "functional_match_interval": [round(bound, 4) for bound in wilson_interval(num_correct, len(texts))],
        "cache": decoding.cache,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an exported demo model")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--canvas", type=int, default=24, help="tokens of an answer; one step for each")
    parser.add_argument("--block", type=int, default=8, help="tokens of a block")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    source = open_model(arguments.model)
    model, tokenizer = source.load(torch.float32, device), source.tokenizer()
    items = heldout_items(tokenizer, arguments.items)
    lengths = {"gen_length": arguments.canvas, "block_length": arguments.block, "steps": arguments.canvas}
    decodings = {name: llada_decoding(**lengths, **options) for name, _, options in MODES}
    for decoding in decodings.values():
        generate(model, tokenizer, decoding, items.prompts[:2], 2)  # what is set up at the first call
    runs: dict[str, list[tuple[float, list[Generation]]]] = {name: [] for name in decodings}
    for _ in range(arguments.repeats):
        for name, is_batched, _ in MODES:
            batch_size = arguments.batch_size if is_batched else 1
            runs[name].append(generate(model, tokenizer, decodings[name], items.prompts, batch_size))
    rows = [measure(name, decodings[name], runs[name], items, tokenizer) for name in decodings]
    for row in rows:
        print(json.dumps(row))
    machine = describe_machine(device.type, f"{torch.get_num_threads()} threads")
    print(f"\n{machine}; {arguments.items} items, batches of {arguments.batch_size}, {lengths}\n")
    print("| mode | tokens/s | against one by one | passes per item | functional match, 95 % interval |")
    print("|---|---|---|---|---|")
    for row in rows:
        low, high = row["functional_match_interval"]
        speed = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        print(
            f"| {row['mode']} | {row['tokens_per_second']:,.0f} | {speed:.1f} | {row['passes_per_item']:.1f} "
            f"| {row['functional_match']:.1%} [{low:.1%}, {high:.1%}] |"
        )


if __name__ == "__main__":
    main()
