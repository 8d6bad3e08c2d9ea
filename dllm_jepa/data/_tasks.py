"""The tasks with one question and one response per row: what stands in their prompts, and a builder for each.

A task is a row of `TASKS` and a line that makes its builder; `dllm_jepa.evals` scores the same tasks by the same rows.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from dllm_jepa.data._builders import join_builder
from dllm_jepa.data._examples import ExampleOptions, TooLong
from dllm_jepa.data._sequences import SequenceDataset
from dllm_jepa.data._sources import Row, naming, read_rows
from dllm_jepa.data._templates import Template, TextTokenizer, format_example
from dllm_jepa.errors import DataError


@dataclass(frozen=True)
class Task:
    """How a row becomes a question and a response.

    Args:
        fields: fields that every row must have, all of them text.
        question: the user field of a row.
        doc: what the rows are, in one sentence.
        heldout_split: the split of its hub dataset that is evaluated on.
    """

    system_prompt: str
    fields: tuple[str, ...]
    question: Callable[[Mapping[str, Any]], str]
    response_field: str
    doc: str = ""
    heldout_split: str = "test"


TASKS = {
    "gsm8k": Task(
        "Answer the math question, show steps.",
        ("question", "answer"),
        lambda row: str(row["question"]),
        "answer",
        "Grade-school maths: rows with `question` and `answer` (ending in `#### number`).",
    ),
    "nlrx": Task(
        "Convert natural language to regular expression.",
        ("description", "regex"),
        lambda row: str(row["description"]),
        "regex",
        "Descriptions of regular expressions: rows with `description` and `regex`.",
    ),
    "spider": Task(
        "Convert natural language to SQL.",
        ("db_id", "question", "query"),
        lambda row: f"For db_id:[{row['db_id']}]\n\n{row['question']}",
        "query",
        "Questions to databases: rows with `db_id`, `question` and `query`.",
        heldout_split="validation",
    ),
    "django": Task(
        "Convert natural language to Python code.",
        ("annotation", "code"),
        lambda row: str(row["annotation"]),
        "code",
        "Descriptions of lines of Python: rows with `annotation` and `code`.",
    ),
}


@dataclass(frozen=True)
class Examples:
    """Rows of a task, and where they come from, for messages."""

    task: Task
    rows: Iterable[Row]
    source: str


def question_answer_builder(name: str, task: Callable[..., Task]) -> Callable[..., SequenceDataset]:
    """Make the dataset builder of a task whose rows come from a file or from the hub.

    It takes the keyword-only arguments of `task`, which makes the task, and those of `read_examples` and
    `encode_examples`.
    """
    doc = TASKS[name].doc if name in TASKS else ""
    return join_builder(name, doc, encode_examples, join_builder(name, "", read_examples, task))


def read_examples(
    task: Callable[[], Task],
    *,
    source: str,
    split: str = "train",
    name: str | None = None,
    max_rows: Annotated[int, Ge(1)] | None = None,
) -> Examples:
    """Read the rows of a task.

    Args:
        task: makes the task.
        source: a .jsonl file, or a hub dataset such as openai/gsm8k.
        split: split of a hub dataset.
        name: configuration of a hub dataset, such as `main`.
        max_rows: read only the first so many; None for all.

    Raises:
        DataError: the source or some of its rows cannot be used.
    """
    made = task()
    return Examples(made, read_rows(source, fields=made.fields, split=split, name=name, max_rows=max_rows), source)


def encode_examples(
    examples: Callable[[], Examples],
    tokenizer: TextTokenizer,
    *,
    max_seq_len: int,
    template: Template = "chat",
    system_prompt: str | None = None,
    too_long: TooLong = "truncate",
    eos_fill: Annotated[int, Ge(0)] = 0,
    canvas_tokens: Annotated[int, Ge(1)] | None = None,
    mask_prompt: bool = False,
    shift_logits: bool = False,
    progress: bool = True,
) -> SequenceDataset:
    """Encode the rows of a task.

    Args:
        examples: reads the rows.
        tokenizer: the model's tokenizer.
        max_seq_len: longest sequence in tokens, at least 4.
        template: `chat` (the tokenizer's chat format) or `plain` (text, for base checkpoints).
        system_prompt: in place of the task's own; "" for none; None for the task's own.
        too_long: `truncate` longer sequences at the end (a cut response gets no end-of-text token) or `refuse` them.
        eos_fill: trained end-of-text tokens after a response, as far as max_seq_len allows; 0 counts as 1.
        canvas_tokens: instead of `eos_fill`, fill every response with end-of-text tokens up to this many tokens, the
            length on which answers will be generated; a response that fills it already gets one.
        mask_prompt: whether noise may replace the prompt too (never the bos).
        shift_logits: the backbone scores a token from the hidden state before it; the first is then never maskable.
        progress: show a progress bar, if stderr is a terminal.

    Raises:
        DataError: there is no row, or some cannot be used. A response that is blank leaves nothing maskable.
        ValueError: an option is out of range, or eos_fill and canvas_tokens are both given.
    """
    options = ExampleOptions(
        template, max_seq_len, too_long, eos_fill, canvas_tokens, mask_prompt, shift_logits, progress
    )
    found = examples()
    task = found.task
    system = task.system_prompt if system_prompt is None else system_prompt

    def encoded() -> Iterator[tuple[list[int], list[bool], bool, str]]:
        for row in found.rows:
            response = row.values[task.response_field]
            with naming(row):
                question = task.question(row.values)
            example = format_example(tokenizer, system=system, question=question, response=response, template=template)
            yield *example, bool(response.strip()), row.name

    return options.collect(tokenizer, encoded(), source=found.source, system_prompt=system)


def spider_task(*, tables: str | None = None) -> Task:
    """The Spider task; with `tables`, Spider's tables.json, the schema text of the row's database precedes a question.

    Raises:
        DataError: the file cannot be read; later, from the task's `question`, a row names a database not in it.
    """
    if tables is None:
        return TASKS["spider"]
    schemas = read_schemas(tables)

    def question(row: Mapping[str, Any]) -> str:
        if row["db_id"] not in schemas:
            raise DataError(f"db_id {row['db_id']!r} is not among the {len(schemas)} databases of {tables}")
        return f"For db_id:[{row['db_id']}]\n\n{schemas[row['db_id']]}\n\n{row['question']}"

    return replace(TASKS["spider"], question=question)


gsm8k = question_answer_builder("gsm8k", lambda: TASKS["gsm8k"])
nlrx = question_answer_builder("nlrx", lambda: TASKS["nlrx"])
django = question_answer_builder("django", lambda: TASKS["django"])
spider = question_answer_builder("spider", spider_task)


def read_schemas(path: str) -> dict[str, str]:
    """Read tables.json of Spider, a list with one object per database.

    Returns:
        Schema text by `db_id`: a line `table(column, column)` per table, in the names that queries use, and a line
        `foreign keys: table.column = table.column, ...` if there are any.
    """
    file = Path(path)
    try:
        databases = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"tables file {file} does not exist (looked for {file.absolute()})") from error
    except OSError as error:
        raise DataError(f"tables file {file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        # Not UTF-8 counts too: UnicodeDecodeError is a ValueError.
        raise DataError(f"tables file {file} is not JSON: {error}") from error
    if not isinstance(databases, list):
        raise DataError(f"tables file {file} must hold a list of databases, not a {type(databases).__name__}")
    schemas = {}
    for number, database in enumerate(databases):
        try:
            schemas[str(database["db_id"])] = _schema_text(database)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(
                f"tables file {file}: database {number} is not of Spider's form ({type(error).__name__}: {error}); it "
                "needs db_id, table_names_original, column_names_original and foreign_keys"
            ) from error
    return schemas


def _schema_text(database: Mapping[str, Any]) -> str:
    tables = database["table_names_original"]
    # The first column is "*", of no table (index -1).
    columns = [(table, column) for table, column in database["column_names_original"]]
    lines = [
        f"{name}({', '.join(column for table, column in columns if table == number)})"
        for number, name in enumerate(tables)
    ]
    keys = [f"{_name(columns[a], tables)} = {_name(columns[b], tables)}" for a, b in database["foreign_keys"]]
    return "\n".join([*lines, f"foreign keys: {', '.join(keys)}"] if keys else lines)


def _name(column: tuple[int, str], tables: list[str]) -> str:
    return f"{tables[column[0]]}.{column[1]}"
