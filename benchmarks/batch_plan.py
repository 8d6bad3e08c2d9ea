"""Padding and rank imbalance of the batch plan on given lengths, and what it costs to plan many sequences.

    python benchmarks/batch_plan.py [NAME=FILE ...] [--model DIR] [--planned 10000000]

FILE is a .jsonl file whose rows have a number `length` in tokens, or, where NAME is gsm8k, nlrx, django or spider, the
rows of that task, which the tokenizer of a model directory (or the built-in one) encodes. Without files: the built-in
regex pairs, and log-normal stand-ins for the four tasks. Nothing is trained: the ranks are simulated.

Padding is the part of the processed tokens that belongs to no sequence. A packed plan has none, but for the one token
of a micro-batch without sequences. Imbalance is max / mean - 1 of the ranks' processed tokens of a step: what a step
takes longer than if all ranks had equal work. `in rounds` is the same with the ranks waiting for each other after
every micro-batch, as they do where weights are sharded.

Prints one JSON line a plan and tables last. Exit code 1 if a goal is missed.
"""

import argparse
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from _machine import describe_machine
from tqdm import tqdm

from dllm_jepa.data import BatchPlan, SequenceDataset, django, gsm8k, nlrx, read_rows, regex_pairs, spider
from dllm_jepa.errors import DataError, UserError
from dllm_jepa.models import Tokenizer
from dllm_jepa.models.tiny import tiny_tokenizer
from dllm_jepa.trained_model import open_model

IntArray = npt.NDArray[np.int64]

BUILDERS: dict[str, Callable[..., SequenceDataset]] = {"gsm8k": gsm8k, "nlrx": nlrx, "django": django, "spider": spider}

# Ranks and sequences of a step: those of the goals, and the same on one rank and in between.
SETTINGS = ((1, 64), (8, 64), (64, 1024), (1024, 16384))
GOAL_SETTINGS = ((8, 64), (1024, 16384))
LARGEST_SHARE = 0.03  # of padding, and of imbalance
PLANNING_SECONDS, PLANNING_GIB = 60, 4


class Spread(NamedTuple):
    """Lengths of a task in tokens: three quantiles, and what none lies below or above."""

    shortest: int
    p5: int
    median: int
    p95: int
    longest: int


# Measured on the training rows of each task (7,473, 8,000, 16,000 and 6,587 rows) with Qwen's vocabulary of 151,643
# entries and the chat format of Dream-7B, cut at 768 tokens as in the packaged 8B configs; Spider without schemas.
STAND_INS = {
    "gsm8k": Spread(87, 118, 191, 335, 559),
    "nlrx": Spread(29, 41, 50, 61, 72),
    "django": Spread(25, 27, 43, 83, 768),
    "spider": Spread(37, 44, 69, 122, 248),
}


def stand_in(spread: Spread, count: int) -> IntArray:
    """int64 [count], log-normal with the median of a task and the distance of its outer quantiles."""
    ninety_percent = 2 * statistics.NormalDist().inv_cdf(0.95)
    sigma = math.log(spread.p95 / spread.p5) / ninety_percent
    drawn = np.random.default_rng(0).lognormal(math.log(spread.median), sigma, count)
    return np.clip(drawn.round(), spread.shortest, spread.longest).astype(np.int64)


def lengths_of(name: str, file: str, tokenizer: Tokenizer, max_seq_len: int) -> IntArray:
    """int64 [rows], lengths in tokens of the rows of a file: its numbers, or those of the tokenizer.

    Raises:
        DataError: the file cannot be read, or has no lengths and NAME is no task.
    """
    lengths = [(row.name, row.values.get("length")) for row in read_rows(file, fields=())]
    if lengths[0][1] is None and name in BUILDERS:
        return BUILDERS[name](tokenizer, source=file, max_seq_len=max_seq_len).lengths
    for row_name, length in lengths:
        if type(length) is not int or length < 1:
            raise DataError(
                f"{row_name}: `length` is {length!r}, must be a whole number of tokens, at least 1; rows of a task "
                f"need none, under one of the names {', '.join(BUILDERS)} (here {name!r})"
            )
    return np.array([length for _, length in lengths], np.int64)


def processed_tokens(lengths: IntArray, packed: bool) -> int:
    """Tokens that a micro-batch of these sequences costs; one of padding for no sequences."""
    if len(lengths) == 0:
        return 1
    return int(lengths.sum() if packed else lengths.max() * len(lengths))


def balance(
    lengths: IntArray, ranks: int, sequences: int, packed: bool, arguments: argparse.Namespace
) -> dict[str, Any]:
    """What is printed of the steps of one plan, which are spread evenly over its epochs."""
    is_drawn = len(lengths) < 4 * sequences
    if is_drawn:
        lengths = np.random.default_rng(0).choice(lengths, 4 * sequences)
    plan = BatchPlan(
        lengths,
        global_batch_size=sequences,
        tokens_per_device=arguments.tokens_per_device,
        num_ranks=ranks,
        seed=0,
        packed=packed,
    )
    steps = np.linspace(0, arguments.epochs * plan.steps_per_epoch - 1, arguments.steps).astype(int)
    num_tokens, costs, seconds = 0, [], []
    for step in np.unique(steps).tolist():
        start = time.perf_counter()
        planned = plan.step(step)
        seconds.append(time.perf_counter() - start)
        of_step = lengths[planned.samples]
        num_tokens += int(of_step.sum())
        costs.append(np.array([[processed_tokens(of_step[m], packed) for m in rank] for rank in planned.micro_batches]))
    # Every element of `costs` is int64 [ranks, micro-batches].
    imbalances = [cost.sum(axis=1).max() / cost.sum(axis=1).mean() - 1 for cost in costs]
    in_rounds = [cost.max(axis=0).sum() / cost.mean(axis=0).sum() - 1 for cost in costs]
    return {
        "ranks": ranks,
        "sequences": sequences,
        "packed": packed,
        "drawn_with_replacement": is_drawn,
        "steps": len(costs),
        "micro_batches_a_rank": round(statistics.fmean(cost.shape[1] for cost in costs), 2),
        "padding": round(1 - num_tokens / int(sum(cost.sum() for cost in costs)), 5),
        "imbalance_mean": round(float(np.mean(imbalances)), 5),
        "imbalance_largest": round(float(np.max(imbalances)), 5),
        "imbalance_in_rounds": round(float(np.mean(in_rounds)), 5),
        "median_seconds_a_step": round(statistics.median(seconds), 5),
    }


def peak_gib() -> float:
    """Largest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def planning(count: int, ranks: int, sequences: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of a plan over `count` sequences: construction, the first step of two epochs, steps anywhere."""

    def timed(call: Callable[[], Any]) -> tuple[float, Any]:
        start = time.perf_counter()
        result = call()
        return round(time.perf_counter() - start, 5), result

    lengths = stand_in(STAND_INS["gsm8k"], count)
    settings = {"global_batch_size": sequences, "tokens_per_device": arguments.tokens_per_device, "num_ranks": ranks}
    construction, plan = timed(lambda: BatchPlan(lengths, **settings, seed=0))
    first, _ = timed(lambda: plan.step(0))
    anywhere = np.random.default_rng(0).permutation(plan.steps_per_epoch)[: 2 * arguments.steps].tolist()
    later = statistics.median(timed(partial(plan.step, step))[0] for step in anywhere)
    second, _ = timed(lambda: plan.step(plan.steps_per_epoch))
    return {
        "planned": count,
        "ranks": ranks,
        "sequences": sequences,
        "steps_an_epoch": plan.steps_per_epoch,
        "construction_seconds": construction,
        "first_step_seconds": first,
        "any_later_step_seconds": later,
        "first_step_of_next_epoch_seconds": second,
        "all_steps_of_an_epoch_seconds": round(first + later * plan.steps_per_epoch, 1),
    }


def sources(arguments: argparse.Namespace) -> Iterator[tuple[str, IntArray]]:
    """Names and lengths to plan."""
    tokenizer = tiny_tokenizer() if arguments.model is None else open_model(arguments.model).tokenizer()
    for name, file in arguments.files:
        yield name, lengths_of(name, file, tokenizer, arguments.max_seq_len)
    if not arguments.files:
        yield "regex_pairs", regex_pairs(tokenizer, num_pairs=8000, max_seq_len=arguments.max_seq_len).lengths
        for name, spread in STAND_INS.items():
            yield f"{name} stand-in", stand_in(spread, 8000)


def balances(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of all lengths, settings and layouts, printed as they come."""
    rows = []
    for name, lengths in sources(arguments):
        low, median, high = (int(value) for value in np.quantile(lengths, (0.05, 0.5, 0.95)))
        spread = [int(lengths.min()), low, median, high, int(lengths.max())]
        print(json.dumps({"lengths": name, "rows": len(lengths), "mean": round(lengths.mean(), 1), "spread": spread}))
        for ranks, sequences in tqdm(SETTINGS, desc=name, unit="setting", disable=None):
            for packed in (True, False):
                rows.append({"lengths": name} | balance(lengths, ranks, sequences, packed, arguments))
                tqdm.write(json.dumps(rows[-1]), file=sys.stdout)
    return rows


def is_missed(row: dict[str, Any]) -> bool:
    """Whether a plan has a goal and does not reach it; padded plans have none."""
    has_goal = row["packed"] and (row["ranks"], row["sequences"]) in GOAL_SETTINGS
    return has_goal and max(row["padding"], row["imbalance_mean"]) >= LARGEST_SHARE


def print_tables(plans: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> None:
    """What a person reads."""
    print("| sequences | ranks x sequences a step | construction | first step | any step | all steps of an epoch |")
    print("|---|---|---|---|---|---|")
    for row in plans:
        print(
            f"| {row['planned']:,} | {row['ranks']:,} x {row['sequences']:,} | {row['construction_seconds']:.2f} s "
            f"| {row['first_step_seconds']:.2f} s | {row['any_later_step_seconds'] * 1000:.2f} ms "
            f"| {row['all_steps_of_an_epoch_seconds']:.0f} s |"
        )
    print("\n| lengths | ranks x sequences | layout | micro-batches | padding | imbalance | largest | in rounds |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['lengths']} | {row['ranks']:,} x {row['sequences']:,} | {'packed' if row['packed'] else 'padded'} "
            f"| {row['micro_batches_a_rank']:.1f} | {row['padding']:.1%} | {row['imbalance_mean']:.1%} "
            f"| {row['imbalance_largest']:.1%} | {row['imbalance_in_rounds']:.1%} |"
            + " above the goal"
            * is_missed(row)
        )


def named_file(entry: str) -> tuple[str, str]:
    """Both parts of NAME=FILE."""
    name, sign, file = entry.partition("=")
    if not (name and sign and file):
        raise argparse.ArgumentTypeError(f"{entry!r} is not of the form NAME=FILE")
    return name, file


def main() -> None:
    """Plan many sequences, then simulate the ranks; judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=named_file, metavar="NAME=FILE", help="lengths, or rows of a task")
    parser.add_argument("--model", type=Path, help="directory whose tokenizer encodes the rows of tasks")
    parser.add_argument("--max-seq-len", type=int, default=768, help="tokens; longer rows are cut")
    parser.add_argument("--tokens-per-device", type=int, default=8192, help="largest micro-batch")
    parser.add_argument("--steps", type=int, default=24, help="steps simulated of each plan")
    parser.add_argument("--epochs", type=int, default=3, help="epochs they are spread over")
    parser.add_argument("--planned", type=int, default=10_000_000, help="sequences of the plan that is timed")
    arguments = parser.parse_args()
    before = peak_gib()
    try:
        plans = [planning(arguments.planned, ranks, sequences, arguments) for ranks, sequences in GOAL_SETTINGS]
        planning_gib = peak_gib() - before
        for row in plans:
            print(json.dumps(row | {"peak_gib_above_imports": round(planning_gib, 3)}))
        rows = balances(arguments)
    except UserError as error:
        sys.exit(f"batch_plan.py: {error}")
    print(
        f"\n{describe_machine('cpu', f'numpy {np.__version__}')}; micro-batches of {arguments.tokens_per_device:,} "
        f"tokens; {planning_gib:.2f} GiB for planning {arguments.planned:,} sequences\n"
    )
    print_tables(plans, rows)
    slowest = max(row["construction_seconds"] + row["first_step_seconds"] for row in plans)
    sys.exit(1 if any(map(is_missed, rows)) or slowest >= PLANNING_SECONDS or planning_gib >= PLANNING_GIB else 0)


if __name__ == "__main__":
    main()
