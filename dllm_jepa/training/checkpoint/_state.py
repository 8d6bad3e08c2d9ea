"""Everything that a run must have to go on as if it had never stopped, and whether what goes on is the same run."""

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dllm_jepa.errors import CheckpointError
from dllm_jepa.training._ranks import Ranks
from dllm_jepa.training.checkpoint._optimizer import (
    check_rates,
    optimizer_numbers,
    optimizer_tensors,
    replay_schedule,
    restore_optimizer,
    trained_tensors,
)
from dllm_jepa.training.checkpoint._reader import SavedCheckpoint

TRAINED = "trained"
_PACKAGES = ("dllm-jepa", "torch", "torchtune", "torchao")


class Part(Protocol):
    """A part of a run with a state of its own."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Its tensors, live: to be saved, or loaded in place."""
        ...


@runtime_checkable
class NumberedPart(Part, Protocol):
    """A part whose state has more than tensors."""

    def state_dict(self) -> dict[str, Any]:
        """Everything else, as JSON can hold it."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        ...


class TrainingState:
    """The live state of a run, for checkpoints to be taken of and loaded into.

    The schedule has no state of its own here: its steps are taken again.

    Args:
        trained: modules with everything that the optimizer trains; what is frozen in them is not part of the state.
        optimizer: an optimizer over the parameters of `trained`.
        lr_scheduler: its schedule, or None.
        parts: everything else by name, such as the target encoder; None is a part that this run does without.
    """

    def __init__(
        self,
        trained: nn.Module,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler | None,
        *,
        parts: Mapping[str, Part | None],
    ) -> None:
        self._trained = trained
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._parts = {name: part for name, part in parts.items() if part is not None}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, live, as `{part}.{name}`."""
        groups: dict[str, Mapping[str, Tensor]] = {
            TRAINED: {name: param.detach() for name, param in trained_tensors(self._trained).items()},
            "optimizer": optimizer_tensors(self._optimizer, self._trained),
            **{name: part.tensors() for name, part in self._parts.items()},
        }
        return {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}

    def numbers(self) -> dict[str, Any]:
        """Everything else, as JSON can hold it."""
        parts = {name: part.state_dict() for name, part in self._parts.items() if isinstance(part, NumberedPart)}
        return {"optimizer": optimizer_numbers(self._optimizer, self._trained), "parts": parts}

    def load(self, checkpoint: SavedCheckpoint, ranks: Ranks, *, override: bool = False) -> None:
        """Become what a verified checkpoint holds; on all ranks at once.

        Raises:
            CheckpointError: if its tensors are those of another run, or its learning rates are and no `override` says
                that this is meant.
        """
        saved = checkpoint.state
        restore_optimizer(self._optimizer, self._trained, saved["optimizer"])
        checkpoint.read_into(self.tensors(), ranks)
        for name, part in self._parts.items():
            if isinstance(part, NumberedPart):
                part.load_state_dict(saved["parts"][name])
        if self._lr_scheduler is not None:
            replay_schedule(self._lr_scheduler, checkpoint.step)
        if not override:
            check_rates(self._optimizer, saved["optimizer"])


def check_trained(checkpoint: SavedCheckpoint, part: str, module: nn.Module) -> None:
    """Hold a checkpoint against the module named `part` of what is trained, before the module has memory."""
    prefix = f"{TRAINED}.{part}."
    wanted = {f"{prefix}{name}": param for name, param in trained_tensors(module).items()}
    checkpoint.check_shapes(wanted, part=prefix)


def run_fingerprint(ranks: Ranks, **known: Any) -> dict[str, Any]:
    """What a run is computed from, as JSON can hold it; every one of its checkpoints stores it.

    Args:
        ranks: their number is added, as are the versions of Python and of the packages that decide what is computed.
        **known: what the recipe knows: `seed`, `base`, `model` and `data`; `base_weights`, the fingerprint of a base
            that is not part of the training state.
    """
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"world_size": ranks.world_size, "versions": versions, **known}


def compare_fingerprints(saved: Mapping[str, Any], present: Mapping[str, Any], *, override: bool) -> list[str]:
    """Compare the run that a checkpoint is of with the one that goes on from it.

    Args:
        saved: state of the checkpoint, its fingerprint within.
        present: fingerprint of this run.
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
        then, now = (f"{run['data']['sequences']:,} sequences" for run in (saved, present))
        if not override:
            raise CheckpointError(
                f"the checkpoint was trained on other data: {then} then, {now} now, and their tokens differ. Give the "
                "same rows and tokenizer, or go on all the same with resume_override=true"
            )
        lines.append(f"data: {then} -> {now} (resume_override)")
    return lines
