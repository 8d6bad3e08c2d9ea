"""The rules of the tree, asserted from syntax trees: who imports whom, private names, and no dead config key."""

import ast
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dllm_jepa.config import Config, Section, load_config

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "dllm_jepa"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(REPOSITORY / "recipes").glob("*.py")])
RECIPES = sorted((REPOSITORY / "recipes").glob("*.py"))
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))

# Single modules below everything; they import none of the package but each other.
FLOOR = {"errors", "files", "kv_cache", "packaged", "packing"}
MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "data": set(),
    "generation": set(),
    "jepa": set(),
    "models": set(),
    "training": set(),
    "evals": {"data", "generation", "models"},
    "export": {"models", "trained_model", "training"},
    "lm_eval_adapter": {"evals", "generation", "models", "trained_model"},
    "memory": {"config", "jepa", "models"},
    "preflight": {"config", "data", "models", "trained_model", "training"},
    "trained_model": {"config", "models", "training"},
    "cli": {"config", "evals", "export", "lm_eval_adapter", "memory", "training"},
}


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


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def test_imports_go_down_only() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        allowed = set() if part == "__init__" else FLOOR if part in FLOOR else FLOOR | {part} | MAY_IMPORT[part]
        assert siblings(parse(path)) <= allowed | {"__version__"}, name_of(path)


def test_nothing_imports_a_recipe() -> None:
    assert RECIPES and CONFIGS  # of which the tests below are made
    recipes = {"recipes", *(path.stem for path in RECIPES)}
    for path in SOURCES:
        assert {dotted.split(".")[0] for dotted in imports(parse(path))} & recipes == set(), name_of(path)


def test_no_private_name_of_torchtune_is_used() -> None:
    for path in SOURCES:
        private = [dotted for dotted in imports(parse(path)) if re.match(r"torchtune\b.*\._", dotted)]
        assert private == [], name_of(path)


def test_files_are_ascii_with_a_docstring() -> None:
    for path in SOURCES:
        assert path.read_bytes().isascii() and ast.get_docstring(parse(path)), name_of(path)


# Config keys and files


def config_of(recipe: str) -> type[Config]:
    config_class: type[Config] = importlib.import_module(recipe).recipe_main.config_class
    return config_class


def recipe_of(path: Path) -> str:
    """The recipe that the launch line of a config names."""
    (recipe,) = re.findall(r"^# Launch: +tune run (?:.* )?(dllm_jepa_\w+) --config", path.read_text(), re.MULTILINE)
    return str(recipe)


def leaves(cls: type[Section], prefix: str = "") -> Iterator[str]:
    """Every key that holds a value; those of a section with the section before them."""
    for name, field in cls.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from leaves(field.annotation, f"{name}.")
        else:
            yield prefix + name


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_every_declared_key_is_read_by_its_recipe_or_a_rule(path: Path) -> None:
    cls = config_of(path.stem)
    read = set(re.findall(r"\bcfg\.([a-z_0-9]+(?:\.[a-z_0-9]+)?)", path.read_text(encoding="utf-8")))
    read |= {part for key in read for part in key.split(".")[:1]}
    for rule in (*cls.rules, *cls.opens, *cls.remarks):
        read |= inspect.signature(rule).parameters.keys()
    assert [key for key in leaves(cls) if key not in read] == []


def test_every_rule_belongs_to_a_recipe() -> None:
    listed = {
        rule for path in RECIPES for cls in [config_of(path.stem)] for rule in (*cls.rules, *cls.opens, *cls.remarks)
    }
    for name in ("dllm_jepa.config._rules", "dllm_jepa.preflight"):
        rules = inspect.getmembers(importlib.import_module(name), inspect.isgeneratorfunction)
        assert [rule for rule, function in rules if rule[0] != "_" and function not in listed] == []


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_config_is_valid_with_all_keys_and_a_header(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo" / "hf").mkdir(parents=True)
    unset = [f"{key}={tmp_path}" for key in OmegaConf.missing_keys(OmegaConf.load(path))]  # all of them paths
    cls = config_of(recipe_of(path))
    assert cls.problems(load_config(["--config", str(path), *unset], cls)) == []
    text = path.read_text(encoding="utf-8")
    keys = re.findall(r"^([a-z_0-9]+):", text, flags=re.MULTILINE)
    assert sorted(keys) == sorted(cls.model_fields)
    alike = next(other for other in CONFIGS if config_of(recipe_of(other)) is cls)
    assert keys == re.findall(r"^([a-z_0-9]+):", alike.read_text(encoding="utf-8"), flags=re.MULTILINE)  # in one order
    header = text.partition("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f" --config {path.stem}" in header
    for word in ("Download", "Override", "GPUs"):
        assert re.search(rf"^# {word}: +\S", header, flags=re.MULTILINE)
    assert text.isascii() and max(map(len, text.splitlines())) <= 120
