"""Train with and without the JEPA loss, and with shuffled targets, over several seeds; all in one report.

    python demo/compare.py                      # make compare; writes runs/compare
    python demo/compare.py --seeds 0 1 --max-steps 500 --overrides optimizer.lr=1e-3

It goes on where it stopped: a run that is scored is not trained again.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import claim_folder, command_line, launch
from report import MAX_SEEDS, Arm, read_scores, write_comparison
from scoring import EVAL_NAME, MEASURE, SCORES_NAME, score_run

from dllm_jepa.errors import LaunchError, UserError

RECIPE = "dllm_jepa_full"
COMMAND_NAME = "command.txt"
ARMS = {
    "diffusion": ("diffusion only", ["jepa_weight=0"]),
    "jepa": ("with JEPA", ["jepa_weight=1"]),
    "shuffled": ("JEPA, shuffled targets", ["jepa_weight=1", "shuffle_targets=true"]),
}


def main() -> None:
    """Parse the command line and run; a `UserError` becomes one message and exit code 1."""
    parser = argparse.ArgumentParser(description="Compare training with and without the JEPA loss.")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="folder (default: runs/compare)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument("--max-steps", type=int, help="optimizer steps of every run (default: those of the config)")
    parser.add_argument("--items", type=int, default=400, help="held-out items to score (default: 400)")
    parser.add_argument("--overrides", nargs="*", default=[], help="key=value of the config, for all runs")
    arguments = parser.parse_args()
    overrides = arguments.overrides + ([f"max_steps={arguments.max_steps}"] if arguments.max_steps else [])
    try:
        print(f"report: {compare(arguments.output, arguments.seeds, arguments.items, overrides)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def compare(output: Path, seeds: Sequence[int], num_items: int, overrides: Sequence[str]) -> Path:
    """Do the runs that are missing, seed by seed, and write the report; returns its path."""
    if not 1 <= len(set(seeds)) == len(seeds) <= MAX_SEEDS:
        raise LaunchError(f"give between 1 and {MAX_SEEDS} different seeds, not {' '.join(map(str, seeds))}")
    claim_folder(output, keep=True)
    for seed in seeds:
        for arm, (_, keys) in ARMS.items():
            finish_run(output / f"{arm}_seed{seed}", num_items, [*overrides, *keys, f"seed={seed}"])
    arms = [Arm(name, [output / f"{arm}_seed{seed}" for seed in seeds]) for arm, (name, _) in ARMS.items()]
    return write_comparison(output, arms, seeds)


def finish_run(run_dir: Path, num_items: int, overrides: Sequence[str]) -> None:
    """Train and score one run, as far as that is not done."""
    # A run that was interrupted has saved no state and starts anew; `auto` lets it have its folder again.
    arguments = ["--config", "tiny", f"output_dir={run_dir}", "resume=auto", *overrides]
    command = command_line(RECIPE, arguments)
    note = run_dir / COMMAND_NAME
    if note.exists() and note.read_text("utf-8").strip() != command:
        raise LaunchError(
            f"{run_dir} was made by\n  {note.read_text('utf-8').strip()}\nnot by\n  {command}\n"
            "Runs of different settings are not compared: choose another folder by --output"
        )
    run_dir.mkdir(exist_ok=True)
    note.write_text(command + "\n", "utf-8")
    is_trained = (run_dir / "hf").exists()
    if not is_trained:
        launch(RECIPE, arguments)
    if not is_trained or not (run_dir / SCORES_NAME).exists() or read_scores(run_dir)["n"] != num_items:
        shutil.rmtree(run_dir / EVAL_NAME, ignore_errors=True)  # of fewer or more items, or of a run done anew
        score_run(run_dir, num_items=num_items, command=command)
    print(f"{run_dir}: functional match {read_scores(run_dir)[MEASURE]:.1%}", flush=True)


if __name__ == "__main__":
    main()
