"""Noise of the held-out loss difference of two models, with shared masks and with independent ones.

    python benchmarks/heldout_noise.py A B TEXT [--seeds 16] [--chunk-tokens 128] [--num-strata 16] [--max-items 32]

A and B are two Hugging Face directories with one tokenizer, TEXT is a .txt or .jsonl file. Every model is evaluated
once for each seed of the masks. With shared masks a difference is that of both under one seed, with independent ones
that of A under a seed and B under the next. Prints one JSON line a seed and a table last. Exit code 1 if shared masks
make the spread of the difference less than ten times smaller.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from _machine import describe_machine
from tqdm import tqdm

from dllm_jepa.evals import heldout_task
from dllm_jepa.models import MaskedDiffusionLM, Tokenizer
from dllm_jepa.trained_model import open_model

FACTOR = 10


def mean_loss(model: MaskedDiffusionLM, tokenizer: Tokenizer, seed: int, arguments: argparse.Namespace) -> float:
    """Loss of a model over all chunks, in nats per token, under the masks of a seed."""
    task = heldout_task(
        tokenizer,
        source=str(arguments.text),
        seed=seed,
        chunk_tokens=arguments.chunk_tokens,
        num_strata=arguments.num_strata,
        max_items=arguments.max_items,
    )
    results = task.evaluate(model, range(len(task.chunks)), batch_size=arguments.batch_size)
    return statistics.fmean(result.score.measures["loss"] for result in results)


def main() -> None:
    """Evaluate both models under all seeds; compare the spreads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument("text", type=Path, metavar="TEXT")
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--chunk-tokens", type=int, default=128)
    parser.add_argument("--num-strata", type=int, default=16)
    parser.add_argument("--max-items", type=int, default=32, help="chunks")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    sources = [open_model(path) for path in (arguments.a, arguments.b)]
    models = [source.load(torch.float32, torch.device(arguments.device)) for source in sources]
    tokenizer = sources[0].tokenizer()

    losses = []
    for seed in tqdm(range(arguments.seeds), desc="seeds", unit="seed", disable=None):
        losses.append([mean_loss(model, tokenizer, seed, arguments) for model in models])
        tqdm.write(json.dumps({"seed": seed, "a": losses[-1][0], "b": losses[-1][1]}), file=sys.stdout)
    of_a, of_b = zip(*losses, strict=True)
    shared = [b - a for a, b in zip(of_a, of_b, strict=True)]
    independent = [b - a for a, b in zip(of_a, of_b[1:] + of_b[:1], strict=True)]
    ratio = statistics.stdev(independent) / statistics.stdev(shared)

    print(
        f"\n{describe_machine()}; {arguments.seeds} seeds, up to {arguments.max_items} chunks of "
        f"{arguments.chunk_tokens} tokens, {arguments.num_strata} strata\n"
    )
    print("| masks | mean difference B - A, nats per token | standard deviation over seeds |\n|---|---|---|")
    for name, differences in (("shared", shared), ("independent", independent)):
        print(f"| {name} | {statistics.fmean(differences):.5f} | {statistics.stdev(differences):.2g} |")
    print(f"\nshared masks make the spread {ratio:.1f} times smaller")
    sys.exit(0 if ratio >= FACTOR else 1)


if __name__ == "__main__":
    main()
