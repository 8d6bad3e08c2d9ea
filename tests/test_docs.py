"""The documentation against the code: links, names, commands, tables, and every example is run.

`python -m tests.test_docs` prints the generated tables of docs/configs.md.
"""

import importlib
import inspect
import json
import math
import re
import shlex
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from dllm_jepa import cli
from dllm_jepa.config import Config, Given, find_configs, find_recipes, key_table, load_config
from dllm_jepa.config._config import marks
from dllm_jepa.data import SequenceDataset
from dllm_jepa.evals import GenerationTask, HeldoutTask, MMLUTask
from dllm_jepa.generation import Decoding
from dllm_jepa.jepa import EMAAdapterTargetEncoder, EMATargetEncoder, Predictor, ViewSampler
from dllm_jepa.models import MaskedDiffusionLM
from dllm_jepa.models._families import FAMILIES
from tests.launching import SMALL, eval_here, run_here

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
RECIPE = REPOSITORY / "recipes" / "dllm_jepa_full.py"
FOLDERS = "benchmarks|configs|demo|dllm_jepa|docs|recipes|tests"


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def fences(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """A page without its fenced blocks and generated tables."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"<!-- begin: .*?<!-- end -->", "", text, flags=re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Every command of a page, in words; lines that end in a backslash go on."""
    text = "\n".join(fences(page.read_text("utf-8"), "bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CONTRIBUTING.md"], ids=name_of)
def test_pages_are_ascii_and_narrow(page: Path) -> None:
    text = page.read_text("utf-8")
    assert text.isascii()
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")] == []


# Links and names


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(page.read_text("utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)|<img [^>]*src=\"([^\"]+)\"", prose(page.read_text("utf-8"))):
        target, _, anchor = "".join(link).partition("#")
        if re.match(r"https?:", target):
            continue
        file = page.parent / target if target else page
        assert file.exists() and (not anchor or anchor in anchors(file)), link


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    assert [path.name for path in (REPOSITORY / "docs").iterdir() if f"docs/{path.name}" not in readme] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_and_tests_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    for path, test in re.findall(rf"`((?:{FOLDERS})/[\w./]*\w)/?(?:::(\w+))?`", text):
        assert (REPOSITORY / path).exists(), path
        assert not test or f"def {test}(" in (REPOSITORY / path).read_text("utf-8"), test


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_recipes_and_builders_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    assert set(re.findall(r"\bdllm_jepa_\w+", text)) <= find_recipes().keys()
    for path in set(re.findall(r"\bdllm_jepa(?:\.\w+)+", text)) - {"dllm_jepa.json"}:
        module, _, name = path.rpartition(".")
        found = importlib.import_module(module) if module != "dllm_jepa" else None
        assert found is None or hasattr(found, name), path
        assert found is not None or importlib.import_module(path), path


def sub_commands(capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    return set(re.findall(r"^ {4}([\w-]+)(?: |$)", capsys.readouterr().out, flags=re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_sub_commands_and_scripts_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page.read_text("utf-8")
    spoken = {words[1] for words in commands(page) if words[0] == "make"} | set(re.findall(r"`make (\w+)", text))
    assert spoken <= set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
    spoken = {words[1] for words in commands(page) if words[0] == "dllm-jepa"}
    spoken |= {word for words in re.findall(r"`dllm-jepa ([\w-]+(?: \| [\w-]+)*)", text) for word in words.split(" | ")}
    assert spoken <= sub_commands(capsys)
    scripts = [words[1] for words in commands(page) if words[0] == "python" and words[1].endswith(".py")]
    assert [script for script in scripts if not (REPOSITORY / script).exists()] == []


def runs(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Recipe and config arguments of every command that runs or validates; a copy stands for its original."""
    copies: dict[str, str] = {}
    for words in commands(page):
        if words[:2] == ["dllm-jepa", "cp"]:
            copies[words[3]] = words[2]
        elif "--config" in words:  # tune run, dllm-jepa validate or memory
            at = words.index("--config")
            recipe, config = (copies.get(word, word) for word in (words[at - 1], words[at + 1]))
            rest = words[at + 2 :]
            if "--gpus" in rest:
                del rest[rest.index("--gpus") : rest.index("--gpus") + 2]
            yield recipe, ["--config", config, *rest]
        elif words[:2] == ["dllm-jepa", "validate"] or words[:2] == ["dllm-jepa", "memory"]:
            raise AssertionError(f"no recipe or no --config: {words}")


def config_of(recipe: str) -> type[Config]:
    config_class: type[Config] = importlib.import_module(recipe).recipe_main.config_class
    return config_class


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_line_is_valid(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    not_here = re.compile(
        r"(checkpoint_dir|base_dir|resume|output_dir): .*(is not a directory|nor an existing path|\?\?\?)"
        r"|.*no module named 'my_"
        r"|smoothing: unknown key"  # the key of one's own
    )
    for recipe, arguments in runs(page):
        cls = config_of(recipe)
        found = cls.problems(load_config(arguments, cls))
        assert [line for line in found if not not_here.match(line)] == [], arguments


def test_there_are_commands_and_examples() -> None:
    assert sum(1 for page in PAGES for _ in runs(page)) >= 10
    parts = ("backbone", "tokenizer", "task", "view sampler", "predictor", "loss")
    assert [part for part in parts if not any(part in name for name in EXAMPLES)] == []


# README


def tree_entries(text: str) -> Iterator[tuple[str, Path]]:
    """Path of every entry of the annotated tree."""
    (block,) = re.findall(r"^## The tree$.*?^```text\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    parents: list[tuple[int, Path]] = [(-1, REPOSITORY)]
    for line in block.splitlines():
        name, indent = line.split()[0], len(line) - len(line.lstrip())
        while parents[-1][0] >= indent:
            parents.pop()
        parents.append((indent, parents[-1][1] / name))
        yield name, parents[-1][1]


def test_the_annotated_tree_is_the_tree() -> None:
    entries = list(tree_entries((REPOSITORY / "README.md").read_text("utf-8")))
    assert [name for name, path in entries if not (path.is_dir() if name.endswith("/") else path.is_file())] == []
    ignored = (REPOSITORY / ".gitignore").read_text("utf-8").replace("/", "").split()
    folders = {p.name for p in REPOSITORY.iterdir() if p.is_dir() and p.name[0] != "." and p.name not in ignored}
    packages = {path.parent.name for path in (REPOSITORY / "dllm_jepa").glob("*/__init__.py")}
    named = {path for _, path in entries}
    assert [name for name in folders if REPOSITORY / name not in named] == []
    assert [name for name in packages if REPOSITORY / "dllm_jepa" / name not in named] == []


def table_rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table under a heading."""
    (part,) = re.findall(rf"^#+ {heading}$(.*?)(?=^#+ |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def test_the_table_of_configs_is_complete() -> None:
    rows = table_rows((REPOSITORY / "README.md").read_text("utf-8"), "Configs")
    names = [row[0].strip("`") for row in rows if row[0].startswith("`")]  # of both tables
    assert sorted(names) == list(find_configs())


def test_the_computed_memory_is_that_of_the_benchmark() -> None:
    committed = sorted((REPOSITORY / "benchmarks" / "results").glob("memory_computed_*.md"))[-1].read_text("utf-8")
    rows = table_rows((REPOSITORY / "README.md").read_text("utf-8"), "Memory")
    assert len(rows) >= 8
    assert [row for row in rows if f"| {' | '.join(row)} |" not in committed] == []


# Reference tables


TABLES = {"training": "dllm_jepa_full", "evaluation": "dllm_jepa_eval", "generation": "dllm_jepa_generate"}


def key_rows(table: str) -> list[str]:
    """A line for every key of a recipe."""
    return key_table(config_of(TABLES[table])).splitlines()[2:]


def given() -> Iterator[tuple[str, Given]]:
    """Every key that holds a component, of every recipe, with what the recipe passes to it."""
    for recipe in TABLES.values():
        for name, field in config_of(recipe).model_fields.items():
            if "Component" in str(field.annotation):
                (passed,) = marks(field, Given) or [Given()]
                yield name, passed


PRODUCTS = {
    "view_sampler": ViewSampler,
    "predictor": Predictor,
    "target_encoder": (EMATargetEncoder, EMAAdapterTargetEncoder),
    "dataset": SequenceDataset,
    "lr_scheduler": torch.optim.lr_scheduler.LRScheduler,
    "model": MaskedDiffusionLM,
    "task": (GenerationTask, HeldoutTask, MMLUTask),
    "decoding": Decoding,
}
NO_BUILDERS = ("build_sequences", "build_generation_task")  # for builders of one's own
BUILDER_MODULES = ("jepa", "data", "training", "models.llada", "models.dream", "models.tiny", "evals", "generation")


def builders() -> Iterator[tuple[str, Given, str]]:
    """Every builder of the package with the key that it is for, told by what it returns."""
    for key, passed in {key: (key, passed) for key, passed in reversed([*given()])}.values():
        for module in (importlib.import_module(f"dllm_jepa.{name}") for name in BUILDER_MODULES):
            for name in module.__all__:
                builder = getattr(module, name)
                product = typing.get_type_hints(builder).get("return") if inspect.isfunction(builder) else None
                is_tokenizer = inspect.isclass(product) and name.endswith("_tokenizer")
                wanted = PRODUCTS.get(key, ())
                is_wanted = inspect.isclass(product) and issubclass(product, wanted) and name not in NO_BUILDERS
                if is_wanted or (is_tokenizer and key == "tokenizer"):
                    yield key, passed, f"{module.__name__}.{name}"


def argument_text(parameter: inspect.Parameter) -> str:
    """An argument with its default, if it has one."""
    has_default = parameter.default is not parameter.empty
    return f"`{parameter.name}: {json.dumps(parameter.default)}`" if has_default else f"`{parameter.name}`"


def builder_rows() -> Iterator[str]:
    """A line for every builder: its key, its path, the arguments that yaml gives it, and its first sentence."""
    for key, passed, path in builders():
        module, _, name = path.rpartition(".")
        builder = getattr(importlib.import_module(module), name)
        parameters = list(inspect.signature(builder).parameters.values())[len(passed.positional) :]
        own = [parameter for parameter in parameters if parameter.name not in {*passed.keywords, *passed.offered}]
        arguments = ", ".join(argument_text(parameter) for parameter in own)
        doc = (inspect.getdoc(builder) or "").split("\n\n")[0].replace("\n", " ")
        yield f"| `{key}` | `{path}` | {arguments or '-'} | {doc} |"


def generated(name: str) -> list[str]:
    """Rows of a generated table of docs/configs.md."""
    text = (REPOSITORY / "docs" / "configs.md").read_text("utf-8")
    (block,) = re.findall(rf"<!-- begin: {name} -->\n(.*?)<!-- end -->", text, flags=re.DOTALL)
    return [line for line in block.splitlines() if line.startswith("|")][2:]


def tables() -> dict[str, list[str]]:
    return {name: key_rows(name) for name in TABLES} | {"builders": [*builder_rows()]}


@pytest.mark.parametrize("name", [*TABLES, "builders"])
def test_the_reference_tables_are_those_of_the_code(name: str) -> None:
    assert generated(name) == tables()[name], "renew the table: python -m tests.test_docs"


def test_the_table_of_passed_arguments_is_that_of_the_classes() -> None:
    rows = table_rows((REPOSITORY / "docs" / "configs.md").read_text("utf-8"), "What the recipe passes")
    documented = {
        row[0].strip("`"): {name for cell in row[1:] for name in re.findall(r"`(\w+)`", cell)} for row in rows
    }
    passed: dict[str, set[str]] = {}
    for key, its in given():
        passed.setdefault(key, set()).update(its.positional, its.keywords, its.offered)
    assert documented == {name: arguments for name, arguments in passed.items() if arguments}


def test_the_results_are_those_of_the_benchmark_and_the_demo() -> None:
    committed = sorted((REPOSITORY / "benchmarks" / "results").glob("flops_meta_*.md"))[-1].read_text("utf-8")
    ratios = [line for line in committed.splitlines() if re.match(r"\|.*\| \d\.\d{3} \|$", line)]
    results = (REPOSITORY / "docs" / "results.md").read_text("utf-8")
    assert len(ratios) == 10 and [line for line in ratios if line not in results] == []
    cfg = load_config(["--config", "tiny"])
    wanted = f"for {cfg['max_steps']:,} steps on {cfg['dataset']['num_pairs']:,} generated pairs"
    assert wanted in " ".join(results.split())


def test_the_table_of_metrics_has_what_a_run_writes(tmp_path: Path) -> None:
    rows = table_rows((REPOSITORY / "docs" / "recipes.md").read_text("utf-8"), "metrics.jsonl")
    documented = {name for row in rows for name in re.findall(r"`(\w[\w.]*)`", row[0])}
    run = run_here(tmp_path / "run", "max_steps=2", "global_batch_size=40", "peak_tflops=1.0")
    assert run[0].keys() | run[1].keys() | {"peak_memory_gib", "reserved_memory_gib"} == documented


# Examples


def apply_diff(source: str, diff: str) -> str:
    """A recipe with a diff of its text; every hunk must fit in exactly one place."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
        old = "".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] in " -")
        new = "".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] in " +")
        assert source.count(old) == 1, f"the recipe has this {source.count(old)} times, not once:\n{old}"
        source = source.replace(old, new)
    return source


def sections(page: str) -> dict[str, str]:
    """Sections of a page that hold an example, by heading."""
    text = (REPOSITORY / "docs" / page).read_text("utf-8")
    parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    return {
        head: body for head, body in zip(parts[1::2], parts[2::2], strict=True) if re.search("```(python|diff)", body)
    }


EXAMPLES = {f"{page}: {head}": body for page in ("extending.md", "recipes.md") for head, body in sections(page).items()}


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_examples_run(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are written, yaml replaces keys of a small config, diffs change the recipe; it trains, then checks run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    known_families, known_modules = dict(FAMILIES), set(sys.modules)
    blocks = fences(example, "python")
    files = {match[1]: block for block in blocks if (match := re.match(r"# (my_\w+\.py)\n", block))}
    for name, block in files.items():
        Path(name).write_text(block, "utf-8")
    recipe = RECIPE.stem
    if diffs := fences(example, "diff"):
        recipe = "my_recipe"
        Path("my_recipe.py").write_text(apply_diff(RECIPE.read_text("utf-8"), "".join(diffs)), "utf-8")
    cfg = load_config([*SMALL, "max_steps=2", "export=online"])
    for block in fences(example, "yaml"):
        for key, value in yaml.safe_load(block).items():
            cfg[key] = value
    OmegaConf.save(OmegaConf.create(cfg), "my.yaml")
    try:
        rows = run_here(tmp_path / "run", recipe=recipe, base=["--config", "my.yaml"])
        assert [row["step"] for row in rows] == [1, 2]
        assert all(math.isfinite(row["loss"]) for row in rows)
        for block in blocks:
            if block not in files.values():
                exec(compile(block, "check", "exec"), {"__name__": "check"})
    finally:
        FAMILIES.clear()
        FAMILIES.update(known_families)
        for name in set(sys.modules) - known_modules:
            if name.startswith("my_"):
                del sys.modules[name]


def test_the_task_of_ones_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = REPOSITORY / "docs" / "evaluation.md"
    (example,) = (block for block in fences(page.read_text("utf-8"), "python") if block.startswith("# my_capitals.py"))
    (command,) = (words for words in commands(page) if any("my_capitals" in word for word in words))
    run_here(tmp_path / "run", "max_steps=1", "export=online")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("my_capitals.py").write_text(example, "utf-8")
    rows = [{"country": name, "capital": name[:2]} for name in ("dog", "truck", "ring")]
    for name in ("test.jsonl", "train.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    own = ("num_shots=", "task=")
    try:
        scores = eval_here(
            tmp_path / "eval", "checkpoint_dir=run/hf", *(word for word in command if word.startswith(own))
        )
    finally:
        sys.modules.pop("my_capitals", None)
    assert scores["num_items"] == 3 and list(scores["scores"]) == ["starts_with", "exact"]
    lines = [json.loads(line) for line in Path("eval/generations.jsonl").read_text("utf-8").splitlines()]
    assert "Name the capital.\n\ntruck\ntr\n\nring\nri\n\ndog\n" in lines[0]["prompt"]  # itself is no shot


if __name__ == "__main__":
    print(*(line for name, rows in tables().items() for line in ("", name, *rows)), sep="\n")
