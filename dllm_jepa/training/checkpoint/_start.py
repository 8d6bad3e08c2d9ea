"""What a run goes on from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dllm_jepa.errors import CheckpointError, LaunchError
from dllm_jepa.training._ranks import Ranks
from dllm_jepa.training.checkpoint._directory import list_checkpoints, step_of
from dllm_jepa.training.checkpoint._manifest import NewerFormatError, UnreadableError
from dllm_jepa.training.checkpoint._reader import SavedCheckpoint


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Args:
        checkpoint: verified checkpoint to go on from; None for step 0.
        damaged: newer checkpoints that were passed over, each with what is wrong with it.
    """

    checkpoint: SavedCheckpoint | None = None
    damaged: Mapping[Path, str] = field(default_factory=dict)


def find_start(resume: str, directory: Path, ranks: Ranks) -> Start:
    """Find and verify the checkpoint to go on from; on all ranks at once, and nothing is written.

    Args:
        resume: "never", "auto" (the newest intact checkpoint, or step 0 if there are none) or the path of one.
        directory: where the checkpoints of the run stand.
        ranks: the ranks; they share the reading.

    Raises:
        NewerFormatError: if the checkpoint can only be read by a later version.
        UnreadableError: if it cannot be read at the moment.
        CheckpointError: if the named one is missing or damaged, or there are checkpoints and all are damaged.
        LaunchError: if `directory` holds checkpoints after the named one.
    """
    if resume == "never":
        return Start()
    if resume == "auto":
        return _newest_intact(directory, ranks)
    checkpoint = ranks.on_rank_zero(lambda: _named(Path(resume), directory))
    checkpoint.verify(ranks)
    return Start(checkpoint)


def _newest_intact(directory: Path, ranks: Ranks) -> Start:
    damaged: dict[Path, str] = {}
    for path in ranks.on_rank_zero(lambda: list_checkpoints(directory))[::-1]:
        try:
            checkpoint = _opened(path, ranks)
            checkpoint.verify(ranks)
        except (NewerFormatError, UnreadableError):
            raise
        except CheckpointError as error:
            damaged[path] = str(error)
        else:
            return Start(checkpoint, damaged)
    if damaged:
        reasons = "\n  ".join(damaged.values())
        raise CheckpointError(
            f"no checkpoint in {directory} is intact, and nothing was changed. Repair one, or move them away to start "
            f"from step 0:\n  {reasons}"
        )
    return Start()


def _opened(path: Path, ranks: Ranks) -> SavedCheckpoint:
    return ranks.on_rank_zero(lambda: SavedCheckpoint(path))


def _named(path: Path, directory: Path) -> SavedCheckpoint:
    inside = next((folder for folder in (path, path / "checkpoints") if list_checkpoints(folder)), None)
    if inside is not None:
        raise CheckpointError(
            f"{path} holds checkpoints but is none itself; give one of them, such as {list_checkpoints(inside)[-1]}"
        )
    checkpoint = SavedCheckpoint(path)
    later = [saved.name for saved in list_checkpoints(directory) if step_of(saved) > step_of(checkpoint.path)]
    if later:
        raise LaunchError(
            f"output_dir holds training states after {checkpoint.path}: {', '.join(later)}; choose another output_dir, "
            "or move them away"
        )
    return checkpoint
