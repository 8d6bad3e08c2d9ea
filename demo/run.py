"""The demo: train the tiny model from scratch, score it on held-out descriptions, and write a report.

python demo/run.py                          # make demo; writes runs/demo
python demo/run.py --output runs/other jepa_weight=0 max_steps=500
python demo/run.py --config tiny_finetune --output runs/demo_finetune
"""

import argparse
import sys
from pathlib import Path

from launch import claim_folder, command_line, launch
from report import write_report
from scoring import MEASURE, score_run

from dllm_jepa.errors import UserError


def main() -> None:
    """Parse the command line and run; a `UserError` becomes one message and exit code 1."""
    parser = argparse.ArgumentParser(description="Train, score and report the demo.")
    parser.add_argument("--config", default="tiny", help="config to train (default: tiny)")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder to write (default: runs/demo)")
    parser.add_argument("--items", type=int, default=400, help="held-out items to score (default: 400)")
    parser.add_argument("overrides", nargs="*", help="key=value of the config")
    arguments = parser.parse_args()
    try:
        run(arguments.config, arguments.output, arguments.items, arguments.overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def run(config: str, output: Path, num_items: int, overrides: list[str]) -> None:
    """Train into a fresh folder, score what was exported, and write the report."""
    claim_folder(output)
    arguments = ["--config", config, f"output_dir={output}", *overrides]
    launch("dllm_jepa_full", arguments)
    scores = score_run(output, num_items=num_items, command=command_line("dllm_jepa_full", arguments))
    low, high = scores[f"{MEASURE}_interval"]
    print(
        f"functional match {scores[MEASURE]:.1%} on {num_items} items (95 % interval {low:.1%} to {high:.1%}), "
        f"exact match {scores['exact_match']:.1%}\n"
        f"before training {scores['untrained']:.1%}, best constant answer {scores['constant']:.1%}\n"
        f"training took {scores['train_seconds']:.0f} s, generating {scores['generation_seconds']:.0f} s"
    )
    print(f"report: {write_report(output)}")


if __name__ == "__main__":
    main()
