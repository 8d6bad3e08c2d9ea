"""Reading rows: every broken file has one message that says where and what."""

import json
from pathlib import Path

import datasets
import pytest

from dllm_jepa.data._sources import read_rows
from dllm_jepa.errors import DataError

GOOD = b'{"question": "fine"}\n'


def write(path: Path, content: bytes | str) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read(source: str, *fields: str, **options: object) -> list[dict[str, object]]:
    return [dict(row.values) for row in read_rows(source, fields=fields or ("question",), **options)]  # type: ignore[arg-type]


def message(source: str, *fields: str, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        read(source, *fields, **options)
    return str(caught.value)


def test_rows_come_in_order_with_their_line_numbers(tmp_path: Path) -> None:
    lines = [{"question": "one"}, {"question": "zw\u00f6lf"}, {"question": "three", "more": 1}]
    source = write(tmp_path / "train.jsonl", "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n")
    rows = list(read_rows(source, fields=["question"]))
    assert [row.values for row in rows] == lines
    assert [row.name for row in rows] == ["train.jsonl line 1", "train.jsonl line 3", "train.jsonl line 5"]


def test_what_is_no_file_of_rows(tmp_path: Path) -> None:
    # A name that ends in .json or .jsonl is never looked up on the hub.
    for name in ("none.jsonl", "none.json"):
        assert f"dataset file {tmp_path / name} does not exist" in message(str(tmp_path / name))
    assert message(str(tmp_path)) == f"dataset file {tmp_path} is a directory; name a .jsonl file in it"
    source = write(tmp_path / "train.jsonl", GOOD)
    assert "`name` (here 'main') is for datasets on the hub" in message(source, name="main")
    assert message(source, "db_id", "question", "query").startswith("train.jsonl line 1 has no field 'db_id', 'query';")
    for content in ("", "\n  \n"):
        assert message(write(tmp_path / "train.jsonl", content)) == f"{source} is empty: it must have at least one row"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"question": "caf\xe9"}', "line 3 is not UTF-8 (byte 18 of the line)"),
        (b'{"question": "a"', "line 3 is not JSON: Expecting ',' delimiter (column 17)"),
        (b"[" * 100_000, "line 3 is not JSON that can be read: "),
        (b"1" * 10_000, "line 3 is not JSON that can be read: "),
        (b"null", "line 3 is null, not an object with named fields"),
        (b'{"query": "a", "id": 2}', "line 3 has no field 'question'; it has the fields 'query', 'id'"),
        (b"{}", "line 3 has no field 'question'; it has no fields"),
        (
            b'{"question": 7, "id": 2}',
            "line 3: field 'question' is a number, must be text (the row has the fields 'question', 'id')",
        ),
        (b'{"question": true}', "line 3: field 'question' is true or false, must be text"),
        (b'{"question": "ab\\ud800"}', "line 3: field 'question' holds half of a surrogate pair at character 3"),
    ],
)
def test_broken_line_is_named(tmp_path: Path, line: bytes, expected: str) -> None:
    source = write(tmp_path / "train.jsonl", GOOD + GOOD + line + b"\n" + GOOD)
    text = message(source)
    assert f"train.jsonl {expected}" in text
    # Errors of the file itself give its full path; those of a row its short name.
    assert "line 3" in text and "\n" not in text


def test_max_rows_reads_no_further(tmp_path: Path) -> None:
    source = write(tmp_path / "train.jsonl", GOOD + GOOD + b"{\n")
    assert len(read(source, max_rows=2)) == 2
    assert "line 3 is not JSON" in message(source, max_rows=3)
    assert "is empty" in message(write(tmp_path / "none.jsonl", b""), max_rows=1)
    with pytest.raises(ValueError, match="max_rows must be 1 or more, got 0"):
        read(source, max_rows=0)


def test_list_fields(tmp_path: Path) -> None:
    source = write(tmp_path / "train.jsonl", '{"messages": [1]}\n{"messages": "hello"}\n')
    assert "train.jsonl line 2: field 'messages' is text, must be a list" in message(source, "messages", kind=list)


def test_hub_rows_and_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, name: str | None, *, split: str) -> list[dict[str, str]]:
        asked.append((path, name, split))
        return [{"question": "a"}, {"question": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = list(read_rows("openai/gsm8k", fields=["question"], split="test", name="main"))
    assert asked == [("openai/gsm8k", "main", "test")]
    assert [row.values["question"] for row in rows] == ["a", "b"]
    assert rows[1].name == "openai/gsm8k test row 2"


def test_hub_errors_are_data_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (datasets.exceptions.DatasetNotFoundError, ConnectionError, ValueError, RuntimeError):

        def load_dataset(path: str, name: str | None, *, split: str, kind: type[Exception] = kind) -> None:
            raise kind("it does not exist")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert message("nobody/nothing", split="test") == (
            "'nobody/nothing' is no existing file, and no dataset of that name (split 'test') could be loaded from the "
            "hub: it does not exist"
        )


def test_real_datasets_object(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": []}]
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split: datasets.Dataset.from_list(rows))
    assert read("nobody/chats", "messages", kind=list) == rows
