"""Start a recipe from a script, and keep the folders that scripts write to apart from the user's own."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dllm_jepa.errors import LaunchError

MARKER_NAME = "written_by_demo.txt"
_TUNE = "tune"
_MARKER_TEXT = "Written by the scripts in demo/. They may remove this folder to write it anew.\n"


def claim_folder(path: Path, *, keep: bool = False) -> None:
    """Make an output folder that carries the marker; one of an earlier call is removed first, unless it is to be kept.

    Raises:
        LaunchError: something without the marker is there; it is left alone.
    """
    marker = path / MARKER_NAME
    if path.exists() and not (path.is_dir() and (marker.is_file() or not any(path.iterdir()))):
        raise LaunchError(
            f"{path} exists and was not written by this script (it has no {MARKER_NAME}); nothing is overwritten: move "
            "it away, or choose another folder by --output"
        )
    if marker.is_file() and not keep:
        print(f"{path} is of an earlier demo and is removed")
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)
    marker.write_text(_MARKER_TEXT, "utf-8")


def command_line(recipe: str, arguments: Sequence[str]) -> str:
    """The command that `launch` runs, as a user would type it."""
    return " ".join([_TUNE, "run", recipe, *arguments])


def launch(recipe: str, arguments: Sequence[str]) -> None:
    """Run a recipe in a process of its own, on all CPU cores.

    Raises:
        LaunchError: torchtune's command is missing, or the run failed (it has said why).
    """
    tune = Path(sys.executable).with_name(_TUNE)
    if not tune.exists():
        raise LaunchError(f"{tune} does not exist: install the project into this environment (make install)")
    print("$", command_line(recipe, arguments), flush=True)
    code = subprocess.run([str(tune), "run", recipe, *arguments], check=False).returncode
    if code != 0:
        raise LaunchError(f"{recipe} ended with exit code {code}; its last lines say why")
