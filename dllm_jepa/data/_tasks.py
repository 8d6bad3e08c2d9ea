"""The tasks with one question and one response per row: what stands in their prompts, and a builder for each."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dllm_jepa.data._examples import ExampleOptions, TooLong
from dllm_jepa.data._schemas import read_schemas
from dllm_jepa.data._sequences import SequenceDataset
from dllm_jepa.data._sources import Row, read_rows
from dllm_jepa.data._templates import Template, TextTokenizer, format_example
from dllm_jepa.errors import DataError


@dataclass(frozen=True)
class Task:
    """How a row becomes a question and a response.

    Args:
        system_prompt: the task's own system prompt.
        fields: fields that every row must have, all of them text.
        question: the user field of a row.
        response_field: the field that holds the response.
    """

    system_prompt: str
    fields: tuple[str, ...]
    question: Callable[[Mapping[str, Any]], str]
    response_field: str


TASKS = {
    "gsm8k": Task(
        "Answer the math question, show steps.", ("question", "answer"), lambda row: str(row["question"]), "answer"
    ),
    "nlrx": Task(
        "Convert natural language to regular expression.",
        ("description", "regex"),
        lambda row: str(row["description"]),
        "regex",
    ),
    "spider": Task(
        "Convert natural language to SQL.",
        ("db_id", "question", "query"),
        lambda row: f"For db_id:[{row['db_id']}]\n\n{row['question']}",
        "query",
    ),
    "django": Task(
        "Convert natural language to Python code.",
        ("annotation", "code"),
        lambda row: str(row["annotation"]),
        "code",
    ),
}


def spider_task(tables: str | None) -> Task:
    """The Spider task, with the schema text of the row's database in the user field if `tables` names its tables.json.

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


def build_task(
    task: Task,
    tokenizer: TextTokenizer,
    rows: Iterable[Row],
    *,
    source: str,
    system_prompt: str | None,
    options: ExampleOptions,
) -> SequenceDataset:
    """Encode the rows of a task.

    Args:
        task: what stands in prompt and response.
        tokenizer: the model's tokenizer.
        rows: rows that have the task's fields.
        source: where they come from, for messages.
        system_prompt: in place of the task's own; "" for none; None for the task's own.
        options: template, lengths, end-of-text fill and masking.

    Raises:
        DataError: there is no row, or some cannot be used. A response that is blank leaves nothing maskable.
    """
    system = task.system_prompt if system_prompt is None else system_prompt

    def examples() -> Iterator[tuple[list[int], list[bool], str]]:
        for row in rows:
            response = row.values[task.response_field]
            tokens, maskable = format_example(
                tokenizer,
                system=system,
                question=_question(task, row),
                response=response,
                template=options.template,
            )
            if response.strip():
                yield *options.finish(tokenizer, tokens, maskable), row.name
            else:
                yield tokens, [False] * len(tokens), row.name

    return options.collect(examples(), source=source)


def _question(task: Task, row: Row) -> str:
    try:
        return task.question(row.values)
    except DataError as error:
        raise DataError(f"{row.name}: {error}") from error


def _read_task(
    task: Task,
    tokenizer: TextTokenizer,
    source: str,
    *,
    split: str,
    name: str | None,
    system_prompt: str | None,
    options: ExampleOptions,
) -> SequenceDataset:
    rows = read_rows(source, fields=task.fields, split=split, name=name)
    return build_task(task, tokenizer, rows, source=source, system_prompt=system_prompt, options=options)


def gsm8k(
    tokenizer: TextTokenizer,
    *,
    source: str,
    max_seq_len: int,
    split: str = "train",
    name: str | None = None,
    template: Template = "chat",
    system_prompt: str | None = None,
    too_long: TooLong = "truncate",
    eos_fill: int = 0,
    canvas_tokens: int | None = None,
    mask_prompt: bool = False,
    shift_logits: bool = False,
    progress: bool = True,
) -> SequenceDataset:
    """Grade-school maths: rows with `question` and `answer` (ending in `#### number`).

    Args:
        tokenizer: the model's tokenizer.
        source: a .jsonl file, or a hub dataset such as openai/gsm8k.
        max_seq_len: longest sequence in tokens.
        split: split of a hub dataset.
        name: configuration of a hub dataset, such as `main`.
        template: see `ExampleOptions`, as are the arguments after `system_prompt`.
        system_prompt: in place of the task's own; "" for none; None for the task's own.
        too_long: `truncate` or `refuse` longer sequences.
        eos_fill: end-of-text tokens after a response.
        canvas_tokens: fill responses to this many tokens instead.
        mask_prompt: whether noise may replace the prompt too.
        shift_logits: the first token is never maskable.
        progress: show a progress bar.

    Raises:
        DataError: the source or some of its rows cannot be used.
        ValueError: an option is out of range.
    """
    options = ExampleOptions(
        template, max_seq_len, too_long, eos_fill, canvas_tokens, mask_prompt, shift_logits, progress
    )
    return _read_task(
        TASKS["gsm8k"], tokenizer, source, split=split, name=name, system_prompt=system_prompt, options=options
    )


def nlrx(
    tokenizer: TextTokenizer,
    *,
    source: str,
    max_seq_len: int,
    split: str = "train",
    name: str | None = None,
    template: Template = "chat",
    system_prompt: str | None = None,
    too_long: TooLong = "truncate",
    eos_fill: int = 0,
    canvas_tokens: int | None = None,
    mask_prompt: bool = False,
    shift_logits: bool = False,
    progress: bool = True,
) -> SequenceDataset:
    """Descriptions of regular expressions: rows with `description` and `regex`. Arguments and errors as in `gsm8k`."""
    options = ExampleOptions(
        template, max_seq_len, too_long, eos_fill, canvas_tokens, mask_prompt, shift_logits, progress
    )
    return _read_task(
        TASKS["nlrx"], tokenizer, source, split=split, name=name, system_prompt=system_prompt, options=options
    )


def django(
    tokenizer: TextTokenizer,
    *,
    source: str,
    max_seq_len: int,
    split: str = "train",
    name: str | None = None,
    template: Template = "chat",
    system_prompt: str | None = None,
    too_long: TooLong = "truncate",
    eos_fill: int = 0,
    canvas_tokens: int | None = None,
    mask_prompt: bool = False,
    shift_logits: bool = False,
    progress: bool = True,
) -> SequenceDataset:
    """Descriptions of lines of Python: rows with `annotation` and `code`. Arguments and errors as in `gsm8k`."""
    options = ExampleOptions(
        template, max_seq_len, too_long, eos_fill, canvas_tokens, mask_prompt, shift_logits, progress
    )
    return _read_task(
        TASKS["django"], tokenizer, source, split=split, name=name, system_prompt=system_prompt, options=options
    )


def spider(
    tokenizer: TextTokenizer,
    *,
    source: str,
    max_seq_len: int,
    tables: str | None = None,
    split: str = "train",
    name: str | None = None,
    template: Template = "chat",
    system_prompt: str | None = None,
    too_long: TooLong = "truncate",
    eos_fill: int = 0,
    canvas_tokens: int | None = None,
    mask_prompt: bool = False,
    shift_logits: bool = False,
    progress: bool = True,
) -> SequenceDataset:
    """Questions to databases: rows with `db_id`, `question` and `query`.

    Args:
        tokenizer: the model's tokenizer.
        source: a .jsonl file, or a hub dataset.
        max_seq_len: longest sequence in tokens.
        tables: Spider's tables.json: the schema text of the row's database then stands in front of the question.
        split: as in `gsm8k`, with all arguments after it.
        name: configuration of a hub dataset.
        template: `chat` or `plain`.
        system_prompt: in place of the task's own; "" for none; None for the task's own.
        too_long: `truncate` or `refuse` longer sequences.
        eos_fill: end-of-text tokens after a response.
        canvas_tokens: fill responses to this many tokens instead.
        mask_prompt: whether noise may replace the prompt too.
        shift_logits: the first token is never maskable.
        progress: show a progress bar.

    Raises:
        DataError: the source, some of its rows or the tables cannot be used.
        ValueError: an option is out of range.
    """
    options = ExampleOptions(
        template, max_seq_len, too_long, eos_fill, canvas_tokens, mask_prompt, shift_logits, progress
    )
    return _read_task(
        spider_task(tables), tokenizer, source, split=split, name=name, system_prompt=system_prompt, options=options
    )
