"""The directory of a model: its JSON and tensor files, its prompt format, and how it appears complete or not at all."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dllm_jepa.errors import CheckpointError
from dllm_jepa.files import publish, sync_files

_PROMPT_NAME = "dllm_jepa.json"
_TEMPLATES = ("chat", "plain")

Prompt = Mapping[str, str | None]
"""How a model was prompted in training: `template` ("chat" or "plain") and `system_prompt` (a text, or None)."""


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object; a CheckpointError says where it is not JSON."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not JSON: byte {error.start} is not UTF-8") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold one JSON object, not a {type(content).__name__}")
    return content


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that people may read, too."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions that any other new file gets."""
    file.touch()
    permissions = file.stat().st_mode
    save_file(dict(tensors), file, metadata={"format": "pt", **(metadata or {})})
    file.chmod(permissions)  # safetensors replaces the file by one that only its owner can read


def read_prompt(directory: Path) -> Prompt | None:
    """The prompt format that an exported model or adapter was trained with; None if its directory names none."""
    file = directory / _PROMPT_NAME
    return check_prompt(read_json_object(file).get("prompt"), file) if file.exists() else None


def check_prompt(prompt: Any, file: Path) -> Prompt | None:
    """Refuse, with a CheckpointError, what a file calls a prompt format and is none; None is allowed."""
    if prompt is None:
        return None
    if (
        not isinstance(prompt, dict)
        or prompt.get("template") not in _TEMPLATES
        or not isinstance(prompt.get("system_prompt"), str | None)
    ):
        raise CheckpointError(
            f"{file}: prompt is {prompt!r}; it must be an object with template ({' or '.join(_TEMPLATES)}) and "
            "system_prompt (a text or null)"
        )
    return {"template": prompt["template"], "system_prompt": prompt.get("system_prompt")}


@contextmanager
def export_directory(path: Path, card: str | None, prompt: Prompt | None) -> Iterator[Path]:
    """Let a directory be filled that gets its name as the last thing that happens to it.

    Args:
        path: directory to create.
        card: text of README.md, the model card; None writes none.
        prompt: prompt format of the training, which is written to dllm_jepa.json; None writes none.

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
            if prompt is not None:
                write_json(unfinished / _PROMPT_NAME, {"prompt": dict(prompt)})
            sync_files(unfinished)
            publish(unfinished, path)
            undo.pop_all()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
