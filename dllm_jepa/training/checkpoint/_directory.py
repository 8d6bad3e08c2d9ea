"""The checkpoints of a run, side by side in one directory.

step_00000100/             complete
step_00000200.unfinished/  being written, or left by a run that died meanwhile
step_00000100.removed/     being removed
step_00000100.damaged/     found damaged by a resume, which kept it
latest                     symbolic link to the newest complete one

And which of them a run goes on from.
"""

import functools
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dllm_jepa.errors import CheckpointError, LaunchError
from dllm_jepa.files import free_name, sync_directory
from dllm_jepa.training._ranks import Ranks
from dllm_jepa.training.checkpoint._manifest import NewerFormatError, UnreadableError
from dllm_jepa.training.checkpoint._reader import SavedCheckpoint

LATEST_NAME = "latest"
UNFINISHED = ".unfinished"
_REMOVED, _DAMAGED = ".removed", ".damaged"
_NAME = re.compile(r"step_(\d{8,})")


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after so many optimizer steps."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The steps that the name of a checkpoint says; 0 if it says none."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else 0


def list_checkpoints(directory: Path) -> list[Path]:
    """What has the name of a complete checkpoint, oldest first."""
    return sorted((path for path in directory.glob("step_*") if _NAME.fullmatch(path.name)), key=step_of)


def remove_old_checkpoints(directory: Path, *, keep_last: int | None, keep_every: int | None) -> None:
    """Remove all but the newest `keep_last` (None: all) and those whose step is a multiple of `keep_every`.

    None is ever half removed under its own name.
    """
    for checkpoint in [] if keep_last is None else list_checkpoints(directory)[:-keep_last]:
        if keep_every is None or step_of(checkpoint) % keep_every:
            checkpoint.rename(free_name(checkpoint, _REMOVED))
    for removed in directory.glob(f"step_*{_REMOVED}*"):
        # A network file system may hold on to a file for a while; the next call tries again.
        shutil.rmtree(removed, ignore_errors=True)


def remove_unfinished(directory: Path) -> None:
    """Remove what a run that died was still writing."""
    for unfinished in directory.glob(f"step_*{UNFINISHED}"):
        shutil.rmtree(unfinished)


def point_to(checkpoint: Path) -> None:
    """Let the link `latest` lead to a checkpoint beside it, in one stroke."""
    link = checkpoint.with_name(LATEST_NAME)
    new = checkpoint.with_name(LATEST_NAME + UNFINISHED)
    try:
        new.unlink(missing_ok=True)
        new.symlink_to(checkpoint.name, target_is_directory=True)
        new.replace(link)
    except OSError as error:  # a file system without links
        print(f"warning: {link} does not lead to {checkpoint.name}: {error}", file=sys.stderr)
        return
    sync_directory(checkpoint.parent)


def move_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that its name is free again; returns where it is now."""
    aside = free_name(checkpoint, _DAMAGED)
    checkpoint.rename(aside)
    sync_directory(checkpoint.parent)
    return aside


@dataclass(frozen=True)
class Start:
    """Where a run starts: at a verified checkpoint or at step 0, and past which newer ones, damaged as they say."""

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
            checkpoint = ranks.on_rank_zero(functools.partial(SavedCheckpoint, path))
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
