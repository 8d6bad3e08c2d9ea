"""Rules across the keys of evaluation and generation; each returns problem lines."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm_jepa.config._components import locate
from dllm_jepa.config._rules import Launch


def task_gets_what_it_takes(
    task: Mapping[str, Any], decoding: Mapping[str, Any] | None, num_shots: int | None
) -> list[str]:
    """A task that generates needs a decoding; one that does not must not be given one, nor shots that it has not."""
    builder: Any = locate(task["_component_"])
    try:
        parameters = inspect.signature(builder).parameters
    except ValueError:  # written in C without a text signature: nothing to compare with
        return []
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return []
    name = task["_component_"]
    lines = []
    if decoding is None and "decoding" in parameters:
        lines.append(
            f"decoding: null given, but {name} generates; give one such as dllm_jepa.generation.llada_decoding"
        )
    if decoding is not None and "decoding" not in parameters:
        lines.append(f"decoding: {name} generates nothing; set decoding: null (decoding=null on the command line)")
    if num_shots is not None and "num_shots" not in parameters:
        lines.append(f"num_shots: {num_shots} given, but {name} has no shots; set num_shots: null")
    return lines


def model_directory_exists(checkpoint_dir: str) -> list[str]:
    """The model must be there."""
    return _directory_problems("checkpoint_dir", checkpoint_dir)


def base_directory_exists(base_dir: str | None) -> list[str]:
    """The model to compare with must be there."""
    return [] if base_dir is None else _directory_problems("base_dir", base_dir)


def one_source_of_prompts(prompt: str | None, prompts_file: str | None) -> list[str]:
    """Prompts come from one place, which must exist; stdin is left alone where there is a prompt."""
    if prompt is None and prompts_file is None:
        return ["prompt, prompts_file: neither given, must be one of them; prompts_file=- reads prompts from stdin"]
    if prompt is not None and prompts_file not in (None, "-"):
        return [f"prompt, prompts_file: both given, must be one of them; leave out prompts_file={prompts_file}"]
    if prompts_file is not None and prompts_file != "-" and not Path(prompts_file).is_file():
        return [f"prompts_file: {prompts_file!r} is not a file (looked for {Path(prompts_file).absolute()})"]
    return []


def new_files(html: str | None, output: str | None) -> list[str]:
    """Files to write have the right ending, a folder to be in, and are not there yet."""
    lines = []
    for key, value, suffix in (("html", html, ".html"), ("output", output, ".jsonl")):
        if value is None:
            continue
        path = Path(value)
        if path.suffix != suffix:
            lines.append(f"{key}: {value!r} given, must end in {suffix}")
        elif path.exists():
            lines.append(f"{key}: {value!r} exists and is kept; choose another name or remove it")
        elif not path.absolute().parent.is_dir():
            lines.append(f"{key}: {value!r} given, but the folder {str(path.parent)!r} does not exist; make it")
        elif not os.access(path.absolute().parent, os.W_OK):
            lines.append(f"{key}: {value!r} given, but the folder {str(path.parent)!r} cannot be written to")
    return lines


def one_process(launch: Launch) -> list[str]:
    """What is shown in a terminal comes from one process."""
    if launch.world_size == 1:
        return []
    return [f"--nproc_per_node: {launch.world_size} processes, but this recipe runs in one; leave it out"]


def _directory_problems(key: str, value: str) -> list[str]:
    if Path(value).is_dir():
        return []
    return [f"{key}: {value!r} is not a directory (looked for {Path(value).absolute()})"]
