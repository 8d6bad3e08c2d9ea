"""What stands on the disk: any damage is found, foreign files run nothing, and no crash loses a checkpoint."""

import errno
import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from dllm_jepa.errors import CheckpointError
from dllm_jepa.training import SavedCheckpoint
from dllm_jepa.training.checkpoint import NewerFormatError, find_start, list_checkpoints
from tests.training.small_checkpoints import ONE_PROCESS, flip_a_byte, forge, save, tensors, writer

FILES = (".metadata", "__0_0.distcp", "config.yaml", "manifest.json", "state.json")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoints", 7)


def is_refused(checkpoint: Path) -> bool:
    """By the function through which every resume goes."""
    try:
        find_start(str(checkpoint), checkpoint.parent, ONE_PROCESS)
    except CheckpointError:
        return True
    return False


def test_a_checkpoint_has_these_files_and_nothing_else(checkpoint: Path) -> None:
    assert sorted(path.name for path in checkpoint.iterdir()) == sorted(FILES)
    assert not is_refused(checkpoint)
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["latest", checkpoint.name]
    assert (checkpoint.parent / "latest").resolve() == checkpoint.resolve()


def test_it_reads_back_what_was_written(checkpoint: Path) -> None:
    saved = SavedCheckpoint(checkpoint)
    assert saved.step == 7
    assert saved.state["metrics"] == {"step": 7}
    assert saved.config.read_text() == "a: 1\n"
    assert saved.size == sum((checkpoint / name).stat().st_size for name in FILES if name != "manifest.json")
    live = {name: torch.zeros_like(tensor) for name, tensor in tensors(7).items()}
    saved.read_into(live, ONE_PROCESS)
    for name, expected in tensors(7).items():
        assert torch.equal(live[name], expected)
        assert torch.equal(saved.read(name, torch.bfloat16), expected.bfloat16())


def test_the_manifest_can_be_checked_by_hand(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["format"] == 1
    for name, record in manifest["files"].items():
        content = (checkpoint / name).read_bytes()
        assert record == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("name", FILES)
def test_every_changed_byte_is_found(checkpoint: Path, name: str) -> None:
    file = checkpoint / name
    original = file.read_bytes()
    unnoticed = []
    for position in range(len(original)):
        for change in (0x01, 0x20, 0x80):  # next digit, other case, no ASCII
            content = bytearray(original)
            content[position] ^= change
            file.write_bytes(content)
            if not is_refused(checkpoint):
                unnoticed.append((position, change))
    assert unnoticed == []
    file.write_bytes(original)
    assert not is_refused(checkpoint)


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_and_addition_is_found(checkpoint: Path, name: str) -> None:
    file = checkpoint / name
    original = file.read_bytes()
    unnoticed = []
    for length in range(len(original)):
        file.write_bytes(original[:length])
        if not is_refused(checkpoint):
            unnoticed.append(length)
    assert unnoticed == []
    for addition in (b"\0", b" ", b"\n"):
        file.write_bytes(original + addition)
        assert is_refused(checkpoint)
    file.unlink()
    assert is_refused(checkpoint)


def test_damage_is_named(checkpoint: Path) -> None:
    flip_a_byte(checkpoint / "config.yaml")
    (checkpoint / "state.json").unlink()
    (checkpoint / "__0_0.distcp").write_bytes(b"short")
    with pytest.raises(CheckpointError) as error:
        SavedCheckpoint(checkpoint).verify()
    size = json.loads((checkpoint / "manifest.json").read_text())["files"]["__0_0.distcp"]["size"]
    for part in (
        f"__0_0.distcp has 5 bytes, not {size:,}",
        "config.yaml does not match its checksum",
        "state.json is missing",
    ):
        assert part in str(error.value)


def test_a_later_format_is_not_called_damaged(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("dllm_jepa.training.checkpoint._manifest.FORMAT", 2)
        later = save(checkpoint.parent, 9)
    # Not even by "auto", which would go back to step 7 and do the steps again.
    for resume in (str(later), "auto"):
        with pytest.raises(NewerFormatError, match=r"has format 2, .* reads format 1: update dllm-jepa"):
            find_start(resume, checkpoint.parent, ONE_PROCESS)


# Foreign files


class Harm:
    """Runs a command when it is unpickled."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.flag),)


def bytes_entry(checkpoint: Path, flag: Path) -> bytes:
    """Metadata that ask DCP to unpickle an object of a data file."""
    with (checkpoint / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    metadata.state_dict_metadata["trained.model.weight"] = BytesStorageMetadata()
    return pickle.dumps(metadata)


def path_outside(checkpoint: Path, flag: Path) -> bytes:
    with (checkpoint / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    metadata.storage_data[MetadataIndex("target.weight", [0, 0])] = _StorageInfo("../elsewhere", 0, 9)
    return pickle.dumps(metadata)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _, flag: pickle.dumps(Harm(flag)), r"asks for (posix|os)\.mkdir, which no checkpoint needs"),
        (lambda _, flag: pickle.dumps(Metadata({}, planner_data=Harm(flag))), r"asks for (posix|os)\.mkdir"),
        (lambda _, flag: b"cbuiltins\neval\n(S'1'\ntR.", r"asks for builtins\.eval"),
        (lambda _, flag: b"ctorch\nload\n(S'x'\ntR.", r"asks for torch\.load"),
        (lambda _, flag: pickle.dumps({"no": "metadata"}), "is refused"),
        (lambda _, flag: b"no pickle at all", "is refused"),
        (lambda _, flag: b"", "is refused"),
        (bytes_entry, "trained.model.weight is not a tensor"),
        (path_outside, r"\.\./elsewhere is not in the manifest"),
    ],
)
def test_metadata_that_mean_harm_run_nothing(
    checkpoint: Path, tmp_path: Path, make: Callable[[Path, Path], bytes], message: str
) -> None:
    flag = tmp_path / "harm was done"
    forge(checkpoint, **{".metadata": make(checkpoint, flag)})
    start = find_start(str(checkpoint), checkpoint.parent, ONE_PROCESS)
    assert start.checkpoint is not None
    with pytest.raises(CheckpointError, match=message):
        start.checkpoint.read_into(tensors(7), ONE_PROCESS)
    assert not flag.exists()


def test_a_data_file_that_means_harm_runs_nothing(checkpoint: Path, tmp_path: Path) -> None:
    flag = tmp_path / "harm was done"
    harmful = io.BytesIO()
    torch.save(Harm(flag), harmful)
    with (checkpoint / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    size = len(harmful.getvalue())
    metadata.storage_data = {name: _StorageInfo("__0_0.distcp", 0, size) for name in metadata.storage_data}
    forge(checkpoint, **{"__0_0.distcp": harmful.getvalue(), ".metadata": pickle.dumps(metadata)})
    with pytest.raises(CheckpointError, match="cannot be read: Weights only load failed"):
        SavedCheckpoint(checkpoint).read_into(tensors(7), ONE_PROCESS)
    assert not flag.exists()


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"format": 1}, "is not a manifest"),
        ({"files": {}}, "is not a manifest"),
        ({"format": 1, "files": {"../../x": {"size": 1, "sha256": "0"}}}, "names files outside its directory"),
        ({"format": 1, "files": {"x": 3}}, "is not a manifest"),
    ],
)
def test_forged_manifests_are_refused(checkpoint: Path, manifest: dict[str, Any], message: str) -> None:
    def canonical(content: dict[str, Any]) -> str:
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    checksum = hashlib.sha256(canonical(manifest).encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(canonical(manifest | {"sha256": checksum}))
    with pytest.raises(CheckpointError, match=message):
        SavedCheckpoint(checkpoint)


def test_other_tensors_are_listed(checkpoint: Path) -> None:
    live = tensors(7) | {"trained.model.weight": torch.zeros(4, 5), "trained.model.layers.1.weight": torch.zeros(2)}
    del live["target.weight"]
    with pytest.raises(CheckpointError) as error:
        SavedCheckpoint(checkpoint).read_into(live, ONE_PROCESS)
    for line in (
        "trained.model.weight: saved (4, 3), needed (4, 5)",
        "trained.model.layers.1.weight: saved nothing, needed (2,)",
        "target.weight: saved (4, 3), needed nothing",
    ):
        assert line in str(error.value)


# Crashes and failures


class Crash(BaseException):
    """The process ends here."""


OPERATIONS = ("mkdir", "rename", "replace", "unlink", "symlink", "fsync", "rmdir", "open")


def operations_of(monkeypatch: pytest.MonkeyPatch, last: int, error: Callable[[], BaseException]) -> list[str]:
    """Let so many operations on the file system happen, and an error in place of the next one; returns their names."""
    done: list[str] = []

    def counted(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            if len(done) > last:
                raise error()
            return operation(*args, **kwargs)

        return call

    for name in OPERATIONS:
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    monkeypatch.setattr(io, "open", counted("io.open", io.open))
    return done


def crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]) -> Iterator[Path]:
    """Directories in which a save of step 8, after steps 4 and 6, broke off at its first, second, ... operation."""
    for last in range(200):
        directory = tmp_path / f"crash_{last}"
        for step in (4, 6):
            save(directory, step, keep_last=2)
        saver = writer(directory, keep_last=2)
        with monkeypatch.context() as patched:
            done = operations_of(patched, last, error)
            try:
                saver.save(8, tensors(8), {"metrics": {}})
            except (Crash, CheckpointError):
                broke_off = True
            else:
                broke_off = False
        if not broke_off:
            assert last > 25, done  # the operations are seen
            return
        yield directory
        shutil.rmtree(directory)
    raise AssertionError("the save never came to its end")


def test_a_crash_at_any_moment_of_a_save_leaves_an_intact_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = set()
    for directory in crashes(tmp_path, monkeypatch, Crash):
        start = find_start("auto", directory, ONE_PROCESS)
        assert start.checkpoint is not None and not start.damaged
        live = tensors(0)
        start.checkpoint.read_into(live, ONE_PROCESS)
        assert torch.equal(live["trained.model.weight"], tensors(start.checkpoint.step)["trained.model.weight"])
        found.add(start.checkpoint.step)
        # And the next save goes through, over whatever is left of this one.
        if start.checkpoint.step == 6:
            save(directory, 8, keep_last=2)
        assert [path.name for path in list_checkpoints(directory)][-2:] == ["step_00000006", "step_00000008"]
    assert found == {6, 8}


def test_a_failure_at_any_moment_of_a_save_is_said_and_leaves_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for directory in crashes(tmp_path, monkeypatch, lambda: OSError(errno.ENOSPC, "No space left on device")):
        assert [path.name for path in list_checkpoints(directory)][-2:-1] in (["step_00000004"], ["step_00000006"])
        for path in list_checkpoints(directory):
            SavedCheckpoint(path).verify()


def test_the_reason_of_a_failure_and_the_last_good_one_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = save(tmp_path, 4)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dllm_jepa.training.checkpoint._manifest.memoryview", full, raising=False)
    with pytest.raises(CheckpointError) as error:
        save(tmp_path, 6)
    assert f"step_00000006 could not be written: [Errno {errno.ENOSPC}] No space left" in str(error.value)
    assert f"the last complete one is {good}" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", good.name]
