"""Writing checkpoints: every rank its own shards, and the name `step_N` only when all of it is on the disk.

Order of a save: files, fsynced; the manifest; the final name; the link `latest`; then old checkpoints are removed.
A crash between any two of these leaves the checkpoints of before, or those of after.
"""

import json
import shutil
import sys
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_jepa.errors import CheckpointError
from dllm_jepa.files import publish, write_durably
from dllm_jepa.training._ranks import Ranks
from dllm_jepa.training.checkpoint._directory import (
    UNFINISHED,
    checkpoint_name,
    list_checkpoints,
    point_to,
    remove_old_checkpoints,
)
from dllm_jepa.training.checkpoint._manifest import (
    CONFIG_NAME,
    STATE_NAME,
    FileRecord,
    record_of,
    write_manifest,
)

# A run of one process is meant to have no process group.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


class CheckpointWriter:
    """Saves training states of a run, one at a time. Made and used on all ranks at once.

    Args:
        directory: where the checkpoints of the run stand.
        ranks: the ranks.
        config_yaml: the resolved config, stored with each checkpoint.
        fingerprint: `run_fingerprint`, stored with each checkpoint.
        every_n_steps: optimizer steps between checkpoints; None for none but those that are asked for.
        keep_last: newest checkpoints to keep; None keeps all.
        keep_every: checkpoints at multiples of so many steps are kept besides.
        async_save: copy the tensors to main memory and write them while the run goes on.
    """

    def __init__(
        self,
        directory: Path,
        ranks: Ranks,
        *,
        config_yaml: str,
        fingerprint: Mapping[str, Any],
        every_n_steps: int | None = None,
        keep_last: int | None = None,
        keep_every: int | None = None,
        async_save: bool = False,
    ) -> None:
        self._directory = directory
        self._ranks = ranks.with_own_group() if async_save else ranks
        self._config_yaml = config_yaml
        self._fingerprint = fingerprint
        self._every_n_steps = every_n_steps
        self._keep = {"keep_last": keep_last, "keep_every": keep_every}
        self._staging = _Staging() if async_save else None
        self._thread = ThreadPoolExecutor(1, "checkpoint") if async_save else None
        self._running: Future[None] | None = None
        self._last_step: int | None = None

    def is_due(self, step: int, *, num_steps: int) -> bool:
        """Whether a checkpoint belongs after `step` of `num_steps` optimizer steps: every so many, and the last one."""
        return self._every_n_steps is not None and (step % self._every_n_steps == 0 or step == num_steps)

    def save(self, step: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Write a checkpoint after so many steps, or begin to; nothing happens if this step was saved last.

        Raises:
            CheckpointError: if it, or the one before it, cannot be written; checkpoints that were complete still are.
        """
        if step == self._last_step:
            return
        self.finish()
        self._last_step = step
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        state = json.dumps({"step": step, "time": now, **self._fingerprint, **numbers}, indent=1) + "\n"
        if self._staging is None or self._thread is None:
            self._write(step, tensors, state)
        else:
            self._running = self._thread.submit(self._write, step, self._staging.copy(tensors), state)

    def finish(self) -> None:
        """Wait until what was saved is on the disk; a CheckpointError if it could not be written."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Finish after a run that ended, for whatever reason; a failure is said but not raised."""
        try:
            self.finish()
        except (CheckpointError, RuntimeError) as error:  # RuntimeError: a lost rank, which is reported elsewhere
            if self._ranks.is_rank_zero:
                print(f"warning: the last checkpoint was not completed: {error}", file=sys.stderr)
        finally:
            if self._thread is not None:
                self._thread.shutdown()

    def _write(self, step: int, tensors: Mapping[str, Tensor], state: str) -> None:
        from torch.distributed.checkpoint.api import CheckpointException  # takes half as long to import as torch itself

        from dllm_jepa.training.checkpoint import _dcp

        final = self._directory / checkpoint_name(step)
        unfinished = final.with_name(final.name + UNFINISHED)
        files = _dcp.HashingFileSystem()
        try:
            self._ranks.on_rank_zero(lambda: _make_anew(unfinished, final))
            _dcp.write_tensors(unfinished, dict(tensors), files, self._ranks.group)
            records = self._ranks.gather_objects(files.records)
            self._ranks.on_rank_zero(lambda: self._commit(unfinished, final, records, state))
        except (CheckpointException, OSError) as error:  # on every rank
            if self._ranks.is_rank_zero:
                shutil.rmtree(unfinished, ignore_errors=True)
            # torch hides why a write failed; the file system knows.
            reasons = {failure for failure in self._ranks.gather_objects(files.failure) if failure}
            reasons = reasons or {*([str(error)] if isinstance(error, OSError) else _dcp.causes(error))}
            raise CheckpointError(self._failure(final, reasons)) from error

    def _commit(self, unfinished: Path, final: Path, records: list[dict[str, FileRecord]], state: str) -> None:
        written = {name: record for of_rank in records for name, record in of_rank.items()}
        for name, text in ((STATE_NAME, state), (CONFIG_NAME, self._config_yaml)):
            write_durably(unfinished / name, text)
            written[name] = record_of(unfinished / name)
        write_manifest(unfinished, written)
        publish(unfinished, final)
        try:
            point_to(final)
            remove_old_checkpoints(self._directory, **self._keep)
        except OSError as error:  # the checkpoint is complete, which is what counts
            print(f"warning: {final} is saved, but tidying up after it failed: {error}", file=sys.stderr)

    def _failure(self, final: Path, reasons: Iterable[str]) -> str:
        complete = list_checkpoints(self._directory)
        last = f"the last complete one is {complete[-1]}" if complete else "there is no complete one yet"
        return f"checkpoint {final} could not be written: {'; '.join(sorted(reasons))}; {last}"


class _Staging:
    """Copies of tensors in main memory, in buffers that are used again for every save."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy all of them; they may change as soon as this returns."""
        copies = {name: self._copy(name, tensor) for name, tensor in tensors.items()}
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return copies

    def _copy(self, key: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value  # part of a subclass that is no tensor, such as the mesh of a DTensor
        if hasattr(value, "__tensor_flatten__"):  # DTensors, and the quantized states of torchao's optimizers
            names, context = value.__tensor_flatten__()
            parts = {name: self._copy(f"{key}.{name}", getattr(value, name)) for name in names}
            return type(value).__tensor_unflatten__(parts, context, value.size(), value.stride())  # type: ignore[attr-defined]
        if key not in self._buffers:
            self._buffers[key] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return self._buffers[key].copy_(value, non_blocking=True)


def _make_anew(unfinished: Path, final: Path) -> None:
    if final.exists():
        raise FileExistsError(f"{final} exists already")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
