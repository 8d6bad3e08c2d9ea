"""What a checkpoint says of the run that wrote it, and comparing it with the run that goes on."""

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

from dllm_jepa.errors import CheckpointError
from dllm_jepa.training._ranks import Ranks

_PACKAGES = ("dllm-jepa", "torch", "torchtune", "torchao")


def run_facts(ranks: Ranks, **facts: Any) -> dict[str, Any]:
    """What is the same for all checkpoints of a run, as JSON can hold it.

    Args:
        ranks: the ranks.
        **facts: what the recipe knows: `seed`, `base`, `model` and `data`; `base_weights`, the fingerprint of a base
            that is not part of the training state.

    Returns:
        The facts, with the versions of Python and of the packages that decide what is computed.
    """
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"world_size": ranks.world_size, "versions": versions, **facts}


def compare_facts(saved: Mapping[str, Any], present: Mapping[str, Any], *, override: bool) -> list[str]:
    """Compare what a checkpoint was made with and what goes on from it.

    Args:
        saved: facts of the checkpoint: `versions`, `world_size`, `data` and, if there are, `base_weights`.
        present: the same of this run.
        override: say that the data differ instead of refusing it.

    Returns:
        A line for every difference that changes no more than rounding.

    Raises:
        CheckpointError: if the data are others, or the weights that adapters stand on.
    """
    if saved.get("base_weights") != present.get("base_weights"):
        raise CheckpointError(
            "the adapters of the checkpoint were trained on other weights than those of "
            f"{present['base'] or 'this run'}: give the checkpoint_dir of its base, which was "
            f"{saved['base'] or 'null (random weights)'}"
        )
    lines = [
        f"{name}: {saved['versions'].get(name)} -> {version}"
        for name, version in present["versions"].items()
        if saved["versions"].get(name) != version
    ]
    if saved["world_size"] != present["world_size"]:
        lines.append(f"ranks: {saved['world_size']} -> {present['world_size']}")
    if saved["data"]["sha256"] != present["data"]["sha256"]:
        then, now = (f"{facts['data']['sequences']:,} sequences" for facts in (saved, present))
        if not override:
            raise CheckpointError(
                f"the checkpoint was trained on other data: {then} then, {now} now, and their tokens differ. Give the "
                "same rows and tokenizer, or go on all the same with resume_override=true"
            )
        lines.append(f"data: {then} -> {now} (resume_override)")
    return lines
