"""What stands on the disk: any damage is found, foreign files run nothing, and no crash loses a checkpoint."""

import errno
import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from dllm_jepa.errors import CheckpointError
from dllm_jepa.training import SavedCheckpoint
from dllm_jepa.training.checkpoint import NewerFormatError, find_start, list_checkpoints
from dllm_jepa.training.checkpoint._manifest import UnreadableError
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


def places(name: str, length: int) -> range:
    """Many bytes of the manifest, whose parts are checked in different ways; the others have one checksum each."""
    return range(0, length, 7 if name == "manifest.json" else max(1, length // 10))


@pytest.mark.parametrize("name", FILES)
def test_every_changed_byte_is_found(checkpoint: Path, name: str) -> None:
    file = checkpoint / name
    original = file.read_bytes()
    unnoticed = []
    for position in places(name, len(original)):
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
    for length in places(name, len(original)):
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


def metadata_of(checkpoint: Path) -> Metadata:
    return pickle.loads((checkpoint / ".metadata").read_bytes())


def bytes_entry(checkpoint: Path, flag: Path) -> bytes:
    """Metadata that ask DCP to unpickle an object of a data file."""
    metadata = metadata_of(checkpoint)
    metadata.state_dict_metadata["trained.model.weight"] = BytesStorageMetadata()
    return pickle.dumps(metadata)


def path_outside(checkpoint: Path, flag: Path) -> bytes:
    metadata = metadata_of(checkpoint)
    metadata.storage_data[MetadataIndex("target.weight", [0, 0])] = _StorageInfo("../elsewhere", 0, 9)
    return pickle.dumps(metadata)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _, flag: pickle.dumps(Harm(flag)), r"asks for (posix|os)\.mkdir, which no checkpoint needs"),
        (lambda _, flag: pickle.dumps(Metadata({}, planner_data=Harm(flag))), r"asks for (posix|os)\.mkdir"),
        (lambda _, flag: b"cbuiltins\neval\n(S'1'\ntR.", r"asks for builtins\.eval"),
        (lambda _, flag: b"ctorch\nload\n(S'x'\ntR.", r"asks for torch\.load"),
        (lambda _, flag: b"cpathlib\nPosixPath\n(N}S'name'\nS'harm'\nstb.", "changes PurePosixPath itself"),
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
    metadata = metadata_of(checkpoint)
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
        ({"format": 1, "files": {"a\0b": {"size": 1, "sha256": "0"}}}, "names files outside its directory"),
        ({"format": 1, "files": {"__0_0.distcp": {"size": 1, "sha256": "0"}}}, "does not list .metadata, config.yaml"),
    ],
)
def test_forged_manifests_are_refused(checkpoint: Path, manifest: dict[str, Any], message: str) -> None:
    def canonical(content: dict[str, Any]) -> str:
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    checksum = hashlib.sha256(canonical(manifest).encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(canonical(manifest | {"sha256": checksum}))
    with pytest.raises(CheckpointError, match=message):
        SavedCheckpoint(checkpoint)


def test_a_file_that_cannot_be_read_at_the_moment_is_not_called_damaged(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system that hiccups must not cost the newest checkpoint, by "auto" neither."""

    def stale(*_: Any) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle")

    save(checkpoint.parent, 9)
    monkeypatch.setattr("dllm_jepa.training.checkpoint._manifest.record_of", stale)
    for resume in ("auto", str(checkpoint.parent / "step_00000009")):
        with pytest.raises(UnreadableError, match=r"step_00000009 cannot be read: .*Stale file handle"):
            find_start(resume, checkpoint.parent, ONE_PROCESS)


def test_a_link_is_followed_once(checkpoint: Path) -> None:
    """A run that saves meanwhile leads `latest` elsewhere."""
    saved = SavedCheckpoint(checkpoint.parent / "latest")
    save(checkpoint.parent, 9)
    assert (checkpoint.parent / "latest").resolve().name == "step_00000009"
    assert saved.read("trained.model.weight", torch.float32).unique().tolist() == [7.0]
    assert saved.step == 7


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


Broken = tuple[Path, BaseException | None]


def broken_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]
) -> Iterator[Broken]:
    """Saves of step 8, after steps 4 and 6, of which the first, second, ... operation fails, and what they raised."""
    for step in (4, 6):
        save(tmp_path / "before", step, keep_last=2)
    for last in range(200):
        directory = Path(shutil.copytree(tmp_path / "before", tmp_path / f"save_{last}", symlinks=True))
        saver = writer(directory, keep_last=2)
        raised = None
        with monkeypatch.context() as patched:
            done = operations_of(patched, last, error)
            try:
                saver.save(8, tensors(8), {"metrics": {}})
            except (Crash, CheckpointError) as caught:
                raised = caught
        if len(done) <= last:
            assert last > 25, done  # the operations are seen
            return
        yield directory, raised
        shutil.rmtree(directory)
    raise AssertionError("the save never came to its end")


def test_a_crash_at_any_moment_of_a_save_leaves_an_intact_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = set()
    for directory, raised in broken_saves(tmp_path, monkeypatch, Crash):
        assert isinstance(raised, Crash)
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error means that step 8 is not there. Once it is there, what fails is a warning."""
    outcomes = set()
    for directory, raised in broken_saves(
        tmp_path, monkeypatch, lambda: OSError(errno.ENOSPC, "No space left on device")
    ):
        said = capsys.readouterr().err
        steps = [int(path.name.removeprefix("step_")) for path in list_checkpoints(directory)]
        for path in list_checkpoints(directory):
            SavedCheckpoint(path).verify()
        if raised is None:
            assert steps[-2:] == [6, 8]
            outcomes.add("tidying up after it failed" in said or "does not lead to" in said)
        elif 8 in steps:  # its name was not yet on the disk for certain
            assert "could not be written" in str(raised)
            outcomes.add("published")
        else:
            assert steps == [4, 6]
            assert "step_00000008 could not be written: [Errno 28] No space left on device" in str(raised)
            assert "the last complete one is" in str(raised) and "step_00000006" in str(raised)
    assert True in outcomes


def test_the_reason_of_a_failure_and_the_last_good_one_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch, in whose archive writer the disk becomes full, speaks of a wrong position instead."""
    good = save(tmp_path, 4)

    class FullDisk(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    @contextmanager
    def create_stream(*_: Any) -> Iterator[io.IOBase]:
        yield FullDisk()

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.FileSystem.create_stream", create_stream)
    with pytest.raises(CheckpointError) as error:
        save(tmp_path, 6)
    assert f"step_00000006 could not be written: [Errno {errno.ENOSPC}] No space left" in str(error.value)
    assert "unexpected pos" not in str(error.value)
    assert f"the last complete one is {good}" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", good.name]
