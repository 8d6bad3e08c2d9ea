"""The wheel: recipes as top-level modules, yaml files inside the package, names that resolve from any folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def pip(*arguments: str) -> None:
    """Run pip without the network."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(REPOSITORY))
    (built,) = folder.glob("dllm_jepa-*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--target", str(folder), str(wheel))
    return folder


def test_the_wheel_holds_what_it_should_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "dllm_jepa").rglob("*.py")}
    recipes = {path.name for path in (REPOSITORY / "recipes").glob("*.py")}
    configs = {
        f"dllm_jepa/configs/{path.relative_to(REPOSITORY / 'configs').as_posix()}"
        for path in (REPOSITORY / "configs").rglob("*.yaml")
    }
    assert recipes and configs
    assert sources | recipes | configs | {"dllm_jepa/py.typed"} <= names
    assert not [name for name in names if name.startswith(("recipes/", "configs/", "tests/", "benchmarks/", "docs/"))]
    assert not [name for name in names if "__pycache__" in name]
    top_level = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top_level == {"dllm_jepa"} | recipes
    (info,) = {name.split("/")[0] for name in names if ".dist-info" in name}
    assert f"{info}/licenses/LICENSE" in names


def run(site: Path, folder: Path, *words: str) -> list[str]:
    """The lines that a Python script of the installed wheel prints."""
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_names_resolve_from_another_folder(site: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util, dllm_jepa; from dllm_jepa.config import find_configs, find_recipes, resolve_config\n"
        "print(dllm_jepa.__file__)\n"
        "print(*find_configs())\n"
        "print(*find_recipes())\n"
        "print(resolve_config('tiny'))\n"
        "print(*(importlib.util.find_spec(name).origin for name in find_recipes()))\n"
    )
    package, configs, recipes, tiny, origins = run(site, tmp_path, "-c", code)
    assert package == str(site / "dllm_jepa" / "__init__.py")
    assert configs.split() == sorted(path.stem for path in (REPOSITORY / "configs").glob("*.yaml"))
    assert recipes.split() == sorted(path.stem for path in (REPOSITORY / "recipes").glob("*.py"))
    assert tiny == str(site / "dllm_jepa" / "configs" / "tiny.yaml")
    assert origins.split() == [str(site / f"{name}.py") for name in recipes.split()]
    assert "CONFIG" in run(site, tmp_path, str(site / "bin" / "dllm-jepa"), "ls")


def test_the_lock_pins_every_dependency_and_torch_without_a_local_version() -> None:
    lines = (REPOSITORY / "requirements.lock").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    assert pins["torchtune"] == "0.6.1"
    assert all("+" not in version for version in pins.values())
