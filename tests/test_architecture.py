"""The rules of the tree, asserted from syntax trees: who imports whom, private names, sizes, and no dead config key."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dllm_jepa.config import SCHEMAS, Key, Section, load_config, problems, schema_of

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "dllm_jepa"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(REPOSITORY / "recipes").glob("*.py")])
RECIPES = sorted((REPOSITORY / "recipes").glob("*.py"))
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))

# Single modules below everything; they import none of the package but each other.
FLOOR = {"errors", "files", "kv_cache", "packing"}
MAY_IMPORT: dict[str, set[str]] = {
    "analysis": set(),
    "config": set(),
    "data": set(),
    "generation": set(),
    "jepa": set(),
    "models": set(),
    "training": set(),
    "evals": {"data", "generation", "models"},
    "export": {"models", "trained_model", "training"},
    "lm_eval_adapter": {"evals", "generation", "models", "trained_model"},
    "memory": {"jepa", "models"},
    "trained_model": {"models", "training"},
    "cli": {
        "analysis",
        "config",
        "data",
        "evals",
        "export",
        "generation",
        "lm_eval_adapter",
        "memory",
        "models",
        "training",
    },
}

# The one module that may name what torchtune does not promise to keep.
PRIVATE_NAMES_MODULE = "dllm_jepa/_torchtune_private.py"

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module or name that is imported, as a dotted path; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def siblings(tree: ast.AST) -> set[str]:
    """The parts of the package that a module imports."""
    parts = (dotted.split(".") for dotted in imports(tree))
    return {part[1] for part in parts if part[0] == "dllm_jepa" and len(part) > 1}


def wrong_imports(part: str, tree: ast.AST) -> set[str]:
    """What a module of a part of the package may not import."""
    allowed = FLOOR if part in FLOOR else FLOOR | {part} | MAY_IMPORT[part]
    return siblings(tree) - allowed - {"__version__"}


def private_torchtune_names(tree: ast.AST) -> set[str]:
    return {dotted for dotted in imports(tree) if re.match(r"torchtune\b.*\._", dotted)}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=name_of)
def test_imports_go_down_only(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part in ("__init__", "_torchtune_private"):
        assert siblings(parse(path)) == set()
    else:
        assert wrong_imports(part, parse(path)) == set()


def test_the_import_rule_sees_every_form_of_import() -> None:
    code = (
        "import dllm_jepa.models\nfrom dllm_jepa import data\ndef f():\n    from dllm_jepa.models.llada import llada\n"
    )
    assert wrong_imports("jepa", ast.parse(code)) == {"models", "data"}
    assert wrong_imports("evals", ast.parse(code)) == set()
    assert (
        wrong_imports("jepa", ast.parse("from dllm_jepa.errors import UserError\nimport dllm_jepa.jepa._views"))
        == set()
    )
    assert wrong_imports("errors", ast.parse("from dllm_jepa.jepa import pool")) == {"jepa"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_imports_a_recipe(path: Path) -> None:
    names = {path.stem for path in RECIPES}
    assert not [dotted for dotted in imports(parse(path)) if dotted.split(".")[0] in {*names, "recipes"}]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_private_names_of_torchtune_stay_in_one_module(path: Path) -> None:
    if name_of(path) != PRIVATE_NAMES_MODULE:
        assert private_torchtune_names(parse(path)) == set()


def test_the_private_name_rule_sees_every_form_of_import() -> None:
    code = (
        "from torchtune._cli import tune\nimport torchtune.config._utils\nfrom torchtune.config import _parse, parse\n"
    )
    assert private_torchtune_names(ast.parse(code)) == {
        "torchtune._cli.tune",
        "torchtune.config._utils",
        "torchtune.config._parse",
    }


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    tree = parse(path)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert long == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_are_ascii_with_a_docstring(path: Path) -> None:
    assert path.read_bytes().isascii()
    assert ast.get_docstring(parse(path))


# Config keys and files


def read_keys(source: str) -> set[str]:
    """The config keys that a recipe reads, as `cfg.a`, `cfg.a.b` or `cfg["a"]`."""
    return set(re.findall(r"\bcfg\.([a-z_0-9]+(?:\.[a-z_0-9]+)?)", source)) | set(
        re.findall(r"\bcfg\[\"([a-z_0-9]+)\"\]", source)
    )


def leaves(keys: tuple[Key, ...]) -> Iterator[str]:
    """Every key that holds a value; those of a section with the section before them."""
    for key in keys:
        yield from (
            (f"{key.name}.{name}" for name in leaves(key.kind.keys)) if isinstance(key.kind, Section) else [key.name]
        )


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_every_declared_key_is_read_by_its_recipe(path: Path) -> None:
    keys = list(leaves(SCHEMAS[path.stem].keys))
    read = read_keys(path.read_text(encoding="utf-8"))
    read |= {key.split(".")[0] for key in read if key not in keys}
    assert [key for key in keys if key not in read] == []


def set_what_must_be_set(path: Path, folder: Path) -> list[str]:
    """Overrides for the values that only the user has: all of them paths."""
    return [f"{key}={folder}" for key in OmegaConf.missing_keys(OmegaConf.load(path))]


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_config_is_valid(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo" / "hf").mkdir(parents=True)
    cfg = load_config(["--config", str(path), *set_what_must_be_set(path, tmp_path)])
    assert problems(cfg, schema_of(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_config_has_all_keys_in_order_and_a_header(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    keys = re.findall(r"^([a-z_0-9]+):", text, flags=re.MULTILINE)
    assert keys == [key.name for key in schema_of(text).keys]
    header = text.partition("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert re.search(rf"^# Launch: +tune run .*dllm_jepa_\w+ --config {path.stem}\b", header, flags=re.MULTILINE)
    for word in ("Download", "Override", "GPUs"):
        assert re.search(rf"^# {word}: +\S", header, flags=re.MULTILINE)
    assert text.isascii() and max(map(len, text.splitlines())) <= 120


def test_there_are_configs_and_recipes() -> None:
    assert CONFIGS and RECIPES
