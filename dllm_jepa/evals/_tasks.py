"""Builders of the tasks whose responses are generated; yaml files name them by `_component_`."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dllm_jepa.data import TASKS, Row, Template, generate_regex_pairs
from dllm_jepa.data import spider_task as spider_questions
from dllm_jepa.errors import ConfigError
from dllm_jepa.evals import django, gsm8k, nlrx, spider
from dllm_jepa.evals._facts import sha256_of
from dllm_jepa.evals._generation_task import GenerationTask, PromptFormat, Scoring, build_generation_task
from dllm_jepa.evals._shots import ShotOrder, Shots
from dllm_jepa.evals._sources import Sources, solve
from dllm_jepa.evals.nlrx import Dialect
from dllm_jepa.generation import Decoding
from dllm_jepa.models import Tokenizer


def gsm8k_task(
    tokenizer: Tokenizer,
    decoding: Decoding,
    *,
    source: str,
    num_shots: int = 0,
    seed: int = 0,
    max_items: int | None = None,
    progress: bool = True,
    split: str = "test",
    name: str | None = None,
    shots_source: str | None = None,
    shots_split: str = "train",
    shots: ShotOrder = "first_k",
    template: Template = "chat",
    system_prompt: str | None = None,
) -> GenerationTask:
    """Grade-school maths: rows with `question` and `answer` (ending in `#### number`), scored by `gsm8k.score`.

    Args:
        tokenizer: the model's tokenizer.
        decoding: how responses are generated.
        source: items: a .jsonl file, or a hub dataset such as openai/gsm8k.
        num_shots: solved examples in front of each question.
        seed: seed of all random numbers.
        max_items: evaluate only the first so many; None for all.
        progress: show a progress bar, if stderr is a terminal.
        split: split of a hub dataset.
        name: configuration of a hub dataset, such as `main`.
        shots_source: a file with the rows that shots are taken from; None for the same hub dataset.
        shots_split: split of the hub dataset for shots.
        shots: `first_k` takes the first rows, `seeded` draws some, the same ones for all items.
        template: `chat` (the tokenizer's chat format) or `plain` (text, for base checkpoints).
        system_prompt: in place of the task's own; "" for none; None for the task's own.

    Raises:
        ConfigError: there are not enough shots, or nothing says where they are.
        DataError: a source or a row cannot be used.
        CheckpointError: the tokenizer has no chat format.
        ValueError: an argument is out of range.
    """
    sources = Sources(source, split, name, shots_source, shots_split)
    examples = sources.read_shots(TASKS["gsm8k"], num_shots, shots, seed)
    return build_generation_task(
        "gsm8k",
        sources.read_items(TASKS["gsm8k"]),
        PromptFormat(TASKS["gsm8k"], examples, template, system_prompt),
        Scoring(gsm8k.score, check=gsm8k.gold_number),
        tokenizer,
        decoding,
        seed=seed,
        max_items=max_items,
        progress=progress,
    )


def django_task(
    tokenizer: Tokenizer,
    decoding: Decoding,
    *,
    source: str,
    num_shots: int = 0,
    seed: int = 0,
    max_items: int | None = None,
    progress: bool = True,
    split: str = "test",
    name: str | None = None,
    shots_source: str | None = None,
    shots_split: str = "train",
    shots: ShotOrder = "first_k",
    template: Template = "chat",
    system_prompt: str | None = None,
) -> GenerationTask:
    """Lines of Python: rows with `annotation` and `code`, scored by `django.score`.

    Arguments and errors as in `gsm8k_task`.
    """
    sources = Sources(source, split, name, shots_source, shots_split)
    examples = sources.read_shots(TASKS["django"], num_shots, shots, seed)
    return build_generation_task(
        "django",
        sources.read_items(TASKS["django"]),
        PromptFormat(TASKS["django"], examples, template, system_prompt),
        Scoring(django.score, check=django.gold_code),
        tokenizer,
        decoding,
        seed=seed,
        max_items=max_items,
        progress=progress,
    )


def nlrx_task(
    tokenizer: Tokenizer,
    decoding: Decoding,
    *,
    source: str,
    num_shots: int = 0,
    seed: int = 0,
    max_items: int | None = None,
    progress: bool = True,
    split: str = "test",
    name: str | None = None,
    shots_source: str | None = None,
    shots_split: str = "train",
    shots: ShotOrder = "first_k",
    template: Template = "chat",
    system_prompt: str | None = None,
    dialect: Dialect = "word_boundary",
) -> GenerationTask:
    r"""Descriptions of lines: rows with `description` and `regex`, scored by `nlrx.score`.

    Arguments and errors as in `gsm8k_task`, and `dialect`: what `\b` in a regex is, see `nlrx.score`.
    """
    sources = Sources(source, split, name, shots_source, shots_split)
    examples = sources.read_shots(TASKS["nlrx"], num_shots, shots, seed)
    return build_generation_task(
        "nlrx",
        sources.read_items(TASKS["nlrx"]),
        PromptFormat(TASKS["nlrx"], examples, template, system_prompt),
        _regex_scoring(dialect, {"ceiling": "about 0.94 on NL-RX-Synth: many of its descriptions are ambiguous"}),
        tokenizer,
        decoding,
        seed=seed,
        max_items=max_items,
        progress=progress,
    )


def spider_task(
    tokenizer: Tokenizer,
    decoding: Decoding,
    *,
    source: str,
    num_shots: int = 0,
    seed: int = 0,
    max_items: int | None = None,
    progress: bool = True,
    split: str = "validation",
    name: str | None = None,
    shots_source: str | None = None,
    shots_split: str = "train",
    shots: ShotOrder = "first_k",
    template: Template = "chat",
    system_prompt: str | None = None,
    tables: str | None = None,
    schema_in_prompt: bool = False,
    databases: str | None = None,
    stand_ins: str = "runs/spider_stand_ins",
) -> GenerationTask:
    """Questions to databases: rows with `db_id`, `question` and `query`, scored by `spider.score`.

    Arguments and errors as in `gsm8k_task`. The other arguments:

    - `databases`: directory with Spider's own databases, `<db_id>/<db_id>.sqlite`; None makes databases with made-up
      rows from `tables` instead, on which scores are no official ones.
    - `stand_ins`: directory in which those are made; those of each source get a folder of their own in it.
    - `tables`: Spider's tables.json; needed without `databases` and for `schema_in_prompt`.
    - `schema_in_prompt`: put the schema text of the row's database in front of its question.
    """
    if schema_in_prompt and tables is None:
        raise ConfigError("task.tables: missing; with schema_in_prompt=true it must name Spider's tables.json")
    task = spider_questions(tables if schema_in_prompt else None)
    sources = Sources(source, split, name, shots_source, shots_split)
    rows = sources.read_items(task)
    return build_generation_task(
        "spider",
        rows,
        PromptFormat(task, sources.read_shots(task, num_shots, shots, seed), template, system_prompt),
        _spider_scoring(rows, databases, stand_ins, tables),
        tokenizer,
        decoding,
        seed=seed,
        max_items=max_items,
        progress=progress,
    )


def regex_pairs_task(
    tokenizer: Tokenizer,
    decoding: Decoding,
    *,
    num_pairs: int,
    num_shots: int = 0,
    seed: int = 0,
    max_items: int | None = None,
    progress: bool = True,
    data_seed: int = 0,
    split: Literal["train", "heldout"] = "heldout",
    task: Literal["first", "second"] = "first",
    template: Template = "chat",
    system_prompt: str | None = None,
) -> GenerationTask:
    """The built-in pairs of description and regex, in the prompt of the nlrx task and scored as it is.

    Args:
        tokenizer: the model's tokenizer.
        decoding: how responses are generated.
        num_pairs: items; see `dllm_jepa.data.generate_regex_pairs`, also for the next ones.
        num_shots: solved examples in front of each question: the first pairs of the training split.
        seed: seed of all random numbers but those of the pairs.
        max_items: evaluate only the first so many; None for all.
        progress: show a progress bar, if stderr is a terminal.
        data_seed: seed of the pairs.
        split: which languages to draw from.
        task: which classes and wordings.
        template: `chat` or `plain`.
        system_prompt: in place of the task's own; "" for none; None for the task's own.

    Raises:
        CheckpointError: the tokenizer has no chat format.
        ValueError: an argument is out of range.
    """

    def pairs(count: int, of_split: Literal["train", "heldout"]) -> list[Row]:
        generated = generate_regex_pairs(num_pairs=count, seed=data_seed, split=of_split, task=task)
        return [Row(f"pair {number}", pair) for number, pair in enumerate(generated, start=1)]

    # Descriptions are distinct: at most one shot is the question itself.
    examples = solve(TASKS["nlrx"], pairs(num_shots + 1, "train"))
    return build_generation_task(
        "regex_pairs",
        pairs(num_pairs, split),
        PromptFormat(TASKS["nlrx"], Shots(examples, num_shots, "the training pairs"), template, system_prompt),
        _regex_scoring("word_boundary", {}),
        tokenizer,
        decoding,
        seed=seed,
        max_items=max_items,
        progress=progress,
    )


def _regex_scoring(dialect: Dialect, known: Mapping[str, Any]) -> Scoring:
    """Scores of regexes, with `known` among the remarks."""

    def remarks(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        golds = [nlrx.gold_regex(row, dialect=dialect) for row in rows]
        regex, count = nlrx.best_constant(golds, dialect=dialect)
        num_empty = sum(nlrx.is_empty(gold, dialect=dialect) for gold in golds)
        constant = {"regex": regex, "functional_match": count / len(golds)}
        return {"best_constant": constant, "golds_that_match_nothing": num_empty / len(golds), **known}

    return Scoring(
        partial(nlrx.score, dialect=dialect),
        check=partial(nlrx.gold_regex, dialect=dialect),
        facts={"dialect": dialect},
        remarks=remarks,
    )


def _spider_scoring(rows: Sequence[Row], databases: str | None, stand_ins: str, tables: str | None) -> Scoring:
    """Scores of queries, on Spider's own databases or on stand-ins."""
    golds = defaultdict(list)
    for row in rows:
        golds[row.values["db_id"]].append(row.values["query"])
    if databases is not None:
        directory = Path(databases)
    elif tables is not None:
        directory = spider.make_stand_ins(Path(tables), Path(stand_ins), golds=golds)
    else:
        raise ConfigError(
            "task.databases, task.tables: neither given; databases must name the directory of Spider's own databases, "
            "or tables its tables.json, from which stand-ins are made"
        )
    found = spider.Databases(directory, golds)
    facts = {
        "are_stand_ins": found.are_stand_ins,
        "sha256": sha256_of([file.name, _digest(file)] for db_id in sorted(golds) for file in found.files(db_id)),
    }
    note = "made-up rows; scores on Spider's own databases differ" if found.are_stand_ins else "as given"
    left_out = (
        "items whose gold query cannot run; one that nearly takes the time allowed may run on one machine and not on "
        "another, so n may differ between machines"
    )
    return Scoring(
        partial(spider.score, databases=found),
        facts={"databases": facts},
        remarks=lambda rows: {"databases": note, "left_out": left_out},
    )


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
