"""The directory of an exported model or adapter, which appears complete or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dllm_jepa.errors import CheckpointError
from dllm_jepa.files import publish, sync_files


@contextmanager
def export_directory(path: Path, card: str | None) -> Iterator[Path]:
    """Let a directory be filled that gets its name as the last thing that happens to it.

    Args:
        path: directory to create.
        card: text of README.md, the model card; None writes none.

    Yields:
        An empty directory beside `path`; an error removes it.

    Raises:
        CheckpointError: if `path` exists or cannot be written.
    """
    if path.exists():
        raise CheckpointError(f"{path} already exists; nothing is overwritten: choose another directory or remove it")
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        if unfinished.exists():
            shutil.rmtree(unfinished)
        with ExitStack() as undo:
            undo.callback(shutil.rmtree, unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            yield unfinished
            if card is not None:
                (unfinished / "README.md").write_text(card, encoding="utf-8")
            sync_files(unfinished)
            publish(unfinished, path)
            undo.pop_all()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
