"""JSON files of a checkpoint directory."""

import json
from pathlib import Path
from typing import Any

from dllm_jepa.errors import CheckpointError


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        CheckpointError: if it is not JSON (with the position) or not an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not JSON: byte {error.start} is not UTF-8") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold one JSON object, not a {type(content).__name__}")
    return content
