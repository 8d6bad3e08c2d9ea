"""Builders of the tasks whose responses are generated; yaml files name them by `_component_`.

A task is its row of `dllm_jepa.data.TASKS`, which training shares, a scorer, and a line at the end of this module.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from dllm_jepa.data import TASKS, Row, Task, Template, generate_regex_pairs, join_builder, read_rows
from dllm_jepa.data import spider_task as spider_questions
from dllm_jepa.errors import ConfigError
from dllm_jepa.evals import django, gsm8k, nlrx, spider
from dllm_jepa.evals._generation_task import GenerationTask, PromptFormat, Scoring, build_generation_task
from dllm_jepa.evals._shots import ShotOrder, Shots, in_order, read_solved, solve
from dllm_jepa.evals._task import Score, sha256_of
from dllm_jepa.evals.nlrx import Dialect
from dllm_jepa.generation import Decoding
from dllm_jepa.models import Tokenizer


def question_answer_task(
    task_name: str, task: Callable[..., Task], scoring: Callable[..., Scoring]
) -> Callable[..., GenerationTask]:
    """Make the builder of a task whose rows come from a file or from the hub.

    Args:
        task_name: what the task is called in scores.json.
        task: makes the task; the builder takes its keyword-only arguments too.
        scoring: makes, from the items, how predictions are judged; the same for its keyword-only arguments.
    """
    doc = TASKS[task_name].doc if task_name in TASKS else ""
    return join_builder(f"{task_name}_task", doc, build_question_answer_task, lambda: task_name, task, scoring)


def build_question_answer_task(
    make_name: Callable[[], str],
    make_task: Callable[[], Task],
    make_scoring: Callable[[Sequence[Row]], Scoring],
    tokenizer: Tokenizer,
    decoding: Decoding,
    *,
    source: str,
    num_shots: int = 0,
    seed: int = 0,
    max_items: int | None = None,
    progress: bool = True,
    split: str | None = None,
    name: str | None = None,
    shots_source: str | None = None,
    shots_split: str = "train",
    shots: ShotOrder = "first_k",
    template: Template = "chat",
    system_prompt: str | None = None,
) -> GenerationTask:
    """Read items and shots, and encode the prompts.

    Args:
        make_name: gives the name of the task.
        make_task: makes the task.
        make_scoring: makes its scoring from the items.
        tokenizer: the model's tokenizer.
        decoding: how responses are generated.
        source: items: a .jsonl file, or a hub dataset such as openai/gsm8k.
        num_shots: solved examples in front of each question.
        seed: seed of all random numbers.
        max_items: evaluate only the first so many; None for all.
        progress: show a progress bar, if stderr is a terminal.
        split: split of a hub dataset; None for the task's own, `test` or, of Spider, `validation`.
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
    made = make_task()
    rows = list(read_rows(source, fields=made.fields, split=split or made.heldout_split, name=name))
    solved, where = read_solved(
        made.fields, num_shots, source=source, name=name, shots_source=shots_source, shots_split=shots_split
    )
    examples = Shots(solve(made, in_order(list(solved), shots, seed)), num_shots, where)
    prompt_format = PromptFormat(made, examples, template, system_prompt)
    parts = (make_name(), rows, prompt_format, make_scoring(rows), tokenizer, decoding)
    return build_generation_task(*parts, seed=seed, max_items=max_items, progress=progress)


def regex_pairs_task(
    tokenizer: Tokenizer,
    decoding: Decoding,
    *,
    num_pairs: Annotated[int, Ge(1)],
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

    `num_pairs`, `split`, `task` and `data_seed`, the seed of the pairs, go to `dllm_jepa.data.generate_regex_pairs`;
    shots are the first pairs of the training split. All other arguments are those of `nlrx_task`.

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
        _regex_scoring("word_boundary"),
        tokenizer,
        decoding,
        seed=seed,
        max_items=max_items,
        progress=progress,
    )


def _nlrx_scoring(rows: Sequence[Row], *, dialect: Dialect = "word_boundary") -> Scoring:
    """`nlrx.score`, with the dialect that it takes."""
    return _regex_scoring(dialect, ceiling="about 0.94 on NL-RX-Synth: many of its descriptions are ambiguous")


def _regex_scoring(dialect: Dialect, **known: str) -> Scoring:
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
        fingerprint={"dialect": dialect},
        remarks=remarks,
    )


def _spider_questions(*, tables: str | None = None, schema_in_prompt: bool = False) -> Task:
    """Ask as in training; `schema_in_prompt` puts the schema text of the row's database, from `tables`, in front."""
    if schema_in_prompt and tables is None:
        raise ConfigError("task.tables: missing; with schema_in_prompt=true it must name Spider's tables.json")
    return spider_questions(tables=tables if schema_in_prompt else None)


def _spider_scoring(rows: Sequence[Row], *, databases: str | None = None, from_code_fence: bool = False) -> Scoring:
    """`spider.score` on `databases`, a directory with `<db_id>/<db_id>.sqlite`.

    With `from_code_fence` only the text in the first code fence (three backticks) of a response counts, if it has one.
    """
    if databases is None:
        raise ConfigError(f"task.databases: null given, must be the directory of Spider's databases. {spider.DOWNLOAD}")
    db_ids = sorted({row.values["db_id"] for row in rows})
    found = spider.Databases(Path(databases), db_ids)
    files = [file for db_id in db_ids for file in found.files(db_id)]
    fingerprint: dict[str, Any] = {"databases": {"sha256": sha256_of([file.name, _digest(file)] for file in files)}}

    def score(prediction: str, row: Mapping[str, Any]) -> Score:
        return spider.score(spider.from_code_fence(prediction) if from_code_fence else prediction, row, found)

    left_out = (
        "items whose gold query cannot run; one that nearly takes the time allowed may run on one machine and not on "
        "another, so n may differ between machines"
    )
    return Scoring(
        score,
        fingerprint=fingerprint | ({"from_code_fence": True} if from_code_fence else {}),
        remarks=lambda rows: {"left_out": left_out},
    )


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


gsm8k_task = question_answer_task(
    "gsm8k", lambda: TASKS["gsm8k"], lambda rows: Scoring(gsm8k.score, check=gsm8k.gold_number)
)
django_task = question_answer_task(
    "django", lambda: TASKS["django"], lambda rows: Scoring(django.score, check=django.gold_code)
)
nlrx_task = question_answer_task("nlrx", lambda: TASKS["nlrx"], _nlrx_scoring)
spider_task = question_answer_task("spider", _spider_questions, _spider_scoring)
