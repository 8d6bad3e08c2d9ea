"""Tasks, chats and texts: exact tokens and maskable positions, written out by hand for a tokenizer of characters."""

import inspect
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from annotated_types import Ge
from hypothesis import given
from hypothesis import strategies as st

from dllm_jepa.data import regex_pairs
from dllm_jepa.data._chat import chat
from dllm_jepa.data._sequences import SequenceDataset
from dllm_jepa.data._tasks import TASKS, django, gsm8k, nlrx, spider
from dllm_jepa.data._templates import close_response, format_example, format_prompt
from dllm_jepa.data._text import split_chunks, text
from dllm_jepa.errors import DataError

BOS, EOS, BLANK = "^", "$", "_"
HEADERS = {"system": "S", "user": "U", "assistant": "A"}


class CharacterTokenizer:
    """A token per character; chats are `^S...;_U...;_A...;_`, with a blank after each turn as some formats have."""

    def __init__(self, *, has_bos: bool = True) -> None:
        self.bos_id = ord(BOS) if has_bos else None
        self.eos_id = ord(EOS)

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        written = "" if self.bos_id is None else BOS
        response = [False] * len(written)
        for message in messages:
            written += HEADERS[message["role"]] + message["content"] + ";" + BLANK
            is_response = message["role"] == "assistant"
            response += [False] + [is_response] * (len(message["content"]) + 1) + [False]
        if add_generation_prompt:
            written += HEADERS["assistant"]
            response.append(False)
        return self.encode(written), response


TOKENIZER = CharacterTokenizer()
BARE_TOKENIZER = CharacterTokenizer(has_bos=False)


def shown(dataset: SequenceDataset, index: int = 0) -> tuple[str, str]:
    """The tokens as text, and the same text with `.` where nothing may be masked."""
    tokens, maskable = dataset[index]
    written = "".join(map(chr, tokens))
    return written, "".join(
        character if flag else "." for character, flag in zip(written, maskable.tolist(), strict=True)
    )


def jsonl(directory: Path, *rows: Mapping[str, Any]) -> str:
    file = directory / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


# No dot in the response: it stands for what may not be masked.
PAIR = {"description": "a dog", "regex": "(a|dog)"}


def build_nlrx(directory: Path, *rows: Mapping[str, Any], **options: Any) -> SequenceDataset:
    defaults: dict[str, Any] = {"max_seq_len": 200, "system_prompt": ""}
    tokenizer = options.pop("tokenizer", TOKENIZER)
    return nlrx(tokenizer, source=jsonl(directory, *(rows or (PAIR,))), **(defaults | options))


def test_prompts_of_all_tasks(tmp_path: Path) -> None:
    row = {
        "question": "How many?",
        "answer": "Two.\n#### 2",
        "description": "a dog",
        "regex": ".*dog.*",
        "annotation": "break from the loop.",
        "code": "break",
        "db_id": "pets_1",
        "query": "SELECT count(*) FROM pets",
    }
    source = jsonl(tmp_path, row)
    expected = {
        gsm8k: ("Answer the math question, show steps.", "How many?", "Two.\n#### 2"),
        nlrx: ("Convert natural language to regular expression.", "a dog", ".*dog.*"),
        django: ("Convert natural language to Python code.", "break from the loop.", "break"),
        spider: (
            "Convert natural language to SQL.",
            "For db_id:[pets_1]\n\nHow many?",
            "SELECT count(*) FROM pets",
        ),
    }
    for builder, (system, question, response) in expected.items():
        dataset = builder(TOKENIZER, source=source, max_seq_len=200)
        prompt = f"^S{system};_U{question};_A"
        assert shown(dataset) == (f"{prompt}{response};$", "." * len(prompt) + f"{response};$")
        dataset = builder(TOKENIZER, source=source, max_seq_len=200, template="plain")
        prompt = f"^{system}\n\n{question}\n"
        assert shown(dataset) == (f"{prompt}{response}$", "." * len(prompt) + f"{response}$")
        assert dataset.source == source


def test_system_prompt_in_place_of_the_tasks_own(tmp_path: Path) -> None:
    for asked, chat_prompt, plain_prompt in (
        ("", "^Ua dog;_A", "^a dog\n"),
        ("Go.", "^SGo.;_Ua dog;_A", "^Go.\n\na dog\n"),
    ):
        assert shown(build_nlrx(tmp_path, system_prompt=asked))[0] == f"{chat_prompt}(a|dog);$"
        plain = build_nlrx(tmp_path, system_prompt=asked, template="plain")
        assert shown(plain)[0] == f"{plain_prompt}(a|dog)$"


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_a_shot_in_a_prompt_reads_like_a_training_example(template: Any) -> None:
    asked: dict[str, Any] = {"system": "Go.", "template": template}
    example = format_example(TOKENIZER, question="a", response="b", **asked)[0]
    prompt = format_prompt(TOKENIZER, shots=[("a", "b"), ("c", "d")], question="e", **asked)
    written = "".join(map(chr, prompt))
    if template == "chat":
        assert written == "^SGo.;_Ua;_Ab;_Uc;_Ad;_Ue;_A"
    else:
        assert written == "^Go.\n\na\nb\n\nc\nd\n\ne\n"
    assert prompt[: len(example)] == example


@given(st.text(max_size=20), st.text(max_size=20), st.sampled_from(["", "Go."]), st.sampled_from(["chat", "plain"]))
def test_the_generation_prompt_is_what_stands_before_the_response(
    question: str, response: str, system: str, template: Any
) -> None:
    prompt = format_prompt(TOKENIZER, system=system, question=question, template=template)
    tokens, maskable = format_example(TOKENIZER, system=system, question=question, response=response, template=template)
    assert tokens[: len(prompt)] == prompt
    assert maskable == [False] * len(prompt) + [True] * (len(tokens) - len(prompt))
    assert tokens[len(prompt) :] == TOKENIZER.encode(response + ";" * (template == "chat"))


@pytest.mark.parametrize(
    ("options", "ending"),
    [
        ({"eos_fill": 1}, "$"),
        ({"eos_fill": 3}, "$$$"),
        # The prompt has 10 tokens and the response 8, of which one ends the turn.
        ({"eos_fill": 100, "max_seq_len": 25}, "$" * 7),
        ({"canvas_tokens": 12}, "$" * 4),
        ({"canvas_tokens": 9}, "$"),
        ({"canvas_tokens": 2}, "$"),
        ({"canvas_tokens": 100, "max_seq_len": 25}, "$" * 7),
    ],
)
def test_end_of_text_tokens(tmp_path: Path, options: dict[str, int], ending: str) -> None:
    dataset = build_nlrx(tmp_path, **options)
    assert shown(dataset) == (f"^Ua dog;_A(a|dog);{ending}", f"{'.' * 10}(a|dog);{ending}")
    assert dataset.num_truncated == 0


def test_canvas_without_a_prompt() -> None:
    tokens, maskable = close_response(TOKENIZER, [7, 8], [True, True], eos_fill=0, canvas_tokens=5, max_seq_len=100)
    assert tokens == [7, 8] + [TOKENIZER.eos_id] * 3
    assert maskable == [True] * 5


def test_truncated_response_has_no_end_of_text_token(tmp_path: Path) -> None:
    # 18 tokens without the end-of-text token.
    for max_seq_len, kept in ((18, "^Ua dog;_A(a|dog);"), (14, "^Ua dog;_A(a|d")):
        dataset = build_nlrx(tmp_path, max_seq_len=max_seq_len, eos_fill=4)
        assert shown(dataset) == (kept, "." * 10 + kept[10:])
        assert dataset.num_truncated == 1
    assert len(build_nlrx(tmp_path, max_seq_len=19, too_long="refuse")) == 1
    with pytest.raises(DataError, match="rows.jsonl line 1: 19 tokens, above max_seq_len 18"):
        build_nlrx(tmp_path, max_seq_len=18, too_long="refuse")


def test_blank_response_leaves_nothing_maskable(tmp_path: Path) -> None:
    rows = (PAIR, {"description": "a cat", "regex": " \n"})
    for mask_prompt in (False, True):
        with pytest.raises(DataError, match="rows.jsonl line 2: no maskable token: there is no response to train on"):
            build_nlrx(tmp_path, *rows, mask_prompt=mask_prompt)


def test_masking_the_prompt_spares_the_bos(tmp_path: Path) -> None:
    dataset = build_nlrx(tmp_path, mask_prompt=True)
    assert shown(dataset) == ("^Ua dog;_A(a|dog);$", ".Ua dog;_A(a|dog);$")
    bare = build_nlrx(tmp_path, mask_prompt=True, tokenizer=BARE_TOKENIZER, template="plain")
    assert shown(bare)[1] == "a dog\n(a|dog)$"
    shifted = build_nlrx(tmp_path, mask_prompt=True, tokenizer=BARE_TOKENIZER, template="plain", shift_logits=True)
    assert shown(shifted)[1] == ". dog\n(a|dog)$"


def test_bad_options(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"template": "alpaca"}, "template must be one of chat, plain, got 'alpaca'"),
        ({"too_long": "chunk"}, "too_long must be one of truncate, refuse, got 'chunk'"),
        ({"max_seq_len": 3}, "max_seq_len must be at least 4 tokens, got 3"),
        ({"eos_fill": -1}, "eos_fill must be 0 or more tokens, got -1"),
        ({"canvas_tokens": 0}, "canvas_tokens must be 1 or more tokens, got 0"),
        ({"eos_fill": 2, "canvas_tokens": 8}, "eos_fill=2 and canvas_tokens=8 exclude each other"),
    ]
    for options, expected in cases:
        with pytest.raises(ValueError, match=expected):
            build_nlrx(tmp_path, **options)


def test_datasets_know_the_prompt_they_were_encoded_with(tmp_path: Path) -> None:
    own = TASKS["nlrx"].system_prompt
    for template, asked, told in (("chat", None, own), ("plain", "Go.", "Go."), ("chat", "", "")):
        dataset = build_nlrx(tmp_path, template=template, system_prompt=asked)
        assert dataset.prompt == {"template": template, "system_prompt": told}
    for asked in (None, "", "Go."):
        dataset = build_chat(tmp_path, said("U hi", "A yo"), system_prompt=asked)
        assert dataset.prompt == {"template": "chat", "system_prompt": asked}
    assert text(TOKENIZER, source=jsonl(tmp_path, {"text": "abc"}), max_seq_len=9).prompt is None


def test_max_rows_of_every_builder(tmp_path: Path) -> None:
    assert len(build_nlrx(tmp_path, PAIR, PAIR, PAIR, max_rows=2)) == 2
    assert len(build_chat(tmp_path, *[said("U hi", "A yo")] * 3, max_rows=2)) == 2
    assert len(text(TOKENIZER, source=jsonl(tmp_path, *[{"text": "abc"}] * 3), max_seq_len=9, max_rows=2)) == 2
    pairs = {"num_pairs": 5, "max_seq_len": 200, "template": "plain"}
    few, all_pairs = regex_pairs(TOKENIZER, max_rows=2, **pairs), regex_pairs(TOKENIZER, **pairs)
    assert [shown(few, index) for index in range(len(few))] == [shown(all_pairs, index) for index in range(2)]


@pytest.mark.parametrize("builder", [gsm8k, nlrx, spider, django, regex_pairs])
def test_builders_show_their_arguments_with_types_and_ranges(builder: Callable[..., SequenceDataset]) -> None:
    parameters, hints = inspect.signature(builder).parameters, typing.get_type_hints(builder, include_extras=True)
    assert {*parameters, "return"} == set(hints) and hints["return"] is SequenceDataset
    assert hints["eos_fill"] == typing.Annotated[int, Ge(0)]
    assert hints["canvas_tokens"] == typing.Annotated[int, Ge(1)] | None
    assert parameters["max_seq_len"].default is inspect.Parameter.empty and parameters["template"].default == "chat"
    assert ("tables" in parameters) is (builder is spider) and ("num_pairs" in parameters) is (builder is regex_pairs)
    assert builder.__name__ in TASKS or builder is regex_pairs
    needed = {"num_pairs": 1} if builder is regex_pairs else {"source": "x.jsonl"}
    with pytest.raises(TypeError, match="tabels"):
        builder(TOKENIZER, max_seq_len=9, tabels=None, **needed)


def test_each_task_names_the_fields_it_misses(tmp_path: Path) -> None:
    source = jsonl(tmp_path, {"id": 1})
    for builder in (gsm8k, nlrx, spider, django):
        fields = ", ".join(map(repr, TASKS[builder.__name__].fields))
        with pytest.raises(DataError, match=f"rows.jsonl line 1 has no field {fields}; it has the fields 'id'"):
            builder(TOKENIZER, source=source, max_seq_len=64)


DATABASE = {
    "db_id": "pets_1",
    "table_names_original": ["pets", "owners"],
    "table_names": ["pets", "owners"],
    "column_names_original": [[-1, "*"], [0, "PetID"], [0, "OwnerID"], [1, "ID"], [1, "Name"]],
    "foreign_keys": [[2, 3]],
}
PETS = {"db_id": "pets_1", "question": "How many pets?", "query": "SELECT 1"}


def write_tables(directory: Path, content: object) -> str:
    file = directory / "tables.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(file)


def test_schema_text_stands_before_the_question(tmp_path: Path) -> None:
    keyless = DATABASE | {"db_id": "empty", "foreign_keys": [], "column_names_original": [[-1, "*"]]}
    tables = write_tables(tmp_path, [keyless, DATABASE])
    source = jsonl(tmp_path, PETS, PETS | {"db_id": "empty"})
    dataset = spider(
        TOKENIZER, source=source, max_seq_len=300, tables=tables, template="plain", system_prompt="", too_long="refuse"
    )
    assert shown(dataset)[0] == (
        "^For db_id:[pets_1]\n\npets(PetID, OwnerID)\nowners(ID, Name)\nforeign keys: pets.OwnerID = owners.ID\n\n"
        "How many pets?\nSELECT 1$"
    )
    assert shown(dataset, 1)[0] == "^For db_id:[empty]\n\npets()\nowners()\n\nHow many pets?\nSELECT 1$"


def test_broken_tables(tmp_path: Path) -> None:
    source = jsonl(tmp_path, PETS)
    for content, expected in [
        ("[", ".*tables.json is not JSON: "),
        ({"db_id": "pets_1"}, ".*tables.json must hold a list of databases, not a dict"),
        ([DATABASE, 3], ".*tables.json: database 1 is not of Spider's form"),
        ([DATABASE | {"foreign_keys": [[2, 99]]}], ".*tables.json: database 0 is not of Spider's form"),
        (None, ".*none.json does not exist"),
    ]:
        tables = write_tables(tmp_path, content) if content else str(tmp_path / "none.json")
        with pytest.raises(DataError, match=f"tables file {expected}"):
            spider(TOKENIZER, source=source, max_seq_len=300, tables=tables)
    source, tables = jsonl(tmp_path, PETS, PETS | {"db_id": "cars_1"}), write_tables(tmp_path, [DATABASE])
    with pytest.raises(DataError, match=r"rows.jsonl line 2: db_id 'cars_1' is not among the 1 databases of .*tables"):
        spider(TOKENIZER, source=source, max_seq_len=300, tables=tables)


def said(*turns: str) -> dict[str, list[dict[str, str]]]:
    """Messages from texts such as `U hello`."""
    roles = {short: role for role, short in HEADERS.items()}
    return {"messages": [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]}


def build_chat(directory: Path, *rows: Mapping[str, Any], **options: Any) -> SequenceDataset:
    return chat(TOKENIZER, source=jsonl(directory, *rows), **({"max_seq_len": 200} | options))


def test_all_assistant_turns_are_maskable(tmp_path: Path) -> None:
    row = said("S be kind", "U hi", "A hello", "U more", "A bye")
    dataset = build_chat(tmp_path, row, canvas_tokens=7)
    # The blank after the last turn is left out, the one after the first stays a visible part of the prompt.
    assert shown(dataset) == ("^Sbe kind;_Uhi;_Ahello;_Umore;_Abye;$$$", "." * 17 + "hello;" + "." * 9 + "bye;$$$")
    masked = build_chat(tmp_path, row, mask_prompt=True)
    assert shown(masked) == ("^Sbe kind;_Uhi;_Ahello;_Umore;_Abye;$", ".Sbe kind;_Uhi;_Ahello;_Umore;_Abye;$")


def test_system_prompt_and_end_of_a_chat(tmp_path: Path) -> None:
    """Messages that nobody answers are left out."""
    row = said("S old", "U hi", "A yo", "U more")
    for asked, expected in ((None, "^Sold;_Uhi;_Ayo;$"), ("", "^Uhi;_Ayo;$"), ("new", "^Snew;_Uhi;_Ayo;$")):
        assert shown(build_chat(tmp_path, row, system_prompt=asked))[0] == expected


def test_chat_without_an_answer(tmp_path: Path) -> None:
    for row in (said("U hi", "U again"), said("U hi", "A ")):
        with pytest.raises(DataError, match="rows.jsonl line 2: no maskable token: there is no response to train on"):
            build_chat(tmp_path, said("U hi", "A yo"), row, mask_prompt=True)


def test_broken_messages(tmp_path: Path) -> None:
    hi = {"role": "user", "content": "hi"}
    cases: list[tuple[list[Any], str]] = [
        ([], "field 'messages' is empty"),
        (["hi"], "message 1 is not an object with role and content"),
        ([hi, hi | {"role": "tool"}], "message 2 has role 'tool', must be one of system, user, assistant"),
        ([hi | {"content": ["hi"]}], "message 1 has no text under 'content'"),
        ([hi | {"content": "\ud800"}], "message 1 holds half of a surrogate pair at character 1"),
    ]
    for messages, expected in cases:
        with pytest.raises(DataError) as caught:
            build_chat(tmp_path, said("U hi", "A yo"), {"messages": messages})
        assert str(caught.value) == f"rows.jsonl line 2: {expected}"


def build_text(directory: Path, *documents: str, tokenizer: Any = TOKENIZER, **options: Any) -> list[tuple[str, str]]:
    source = jsonl(directory, *({"text": document} for document in documents))
    dataset = text(tokenizer, source=source, **options)
    return [shown(dataset, index) for index in range(len(dataset))]


def test_documents_are_cut_into_chunks_with_their_own_bos(tmp_path: Path) -> None:
    assert build_text(tmp_path, "abc", " \n", "", "abcdefgh", max_seq_len=5) == [
        ("^abc$", ".abc$"),
        ("^abcd", ".abcd"),
        # The end-of-text token alone would be a rest of one: it takes a token along.
        ("^efg", ".efg"),
        ("^h$", ".h$"),
    ]


def test_texts_that_are_not_chunked(tmp_path: Path) -> None:
    truncated = build_text(tmp_path, "abc", "abcdefgh", max_seq_len=5, too_long="truncate")
    assert truncated == [("^abc$", ".abc$"), ("^abcd", ".abcd")]
    with pytest.raises(DataError, match="rows.jsonl line 2: 10 tokens, above max_seq_len 5"):
        build_text(tmp_path, "abc", "abcdefgh", max_seq_len=5, too_long="refuse")
    with pytest.raises(ValueError, match="too_long must be one of chunk, truncate, refuse, got 'cut'"):
        build_text(tmp_path, "abc", max_seq_len=5, too_long="cut")
    with pytest.raises(ValueError, match="max_seq_len must be at least 4 tokens, got 3"):
        build_text(tmp_path, "abc", max_seq_len=3)
    with pytest.raises(DataError, match="rows.jsonl has no rows"):
        build_text(tmp_path, " ", max_seq_len=5)


def test_text_for_a_shifted_model_without_bos(tmp_path: Path) -> None:
    made = build_text(tmp_path, "abcdefg", tokenizer=BARE_TOKENIZER, max_seq_len=4, shift_logits=True)
    assert made == [("abcd", ".bcd"), ("efg$", ".fg$")]


@given(st.integers(2, 60), st.integers(3, 20))
def test_chunks_hold_the_document_and_none_is_a_single_token(length: int, size: int) -> None:
    document = list(range(length))
    chunks = split_chunks(document, size)
    assert [token for chunk in chunks for token in chunk] == document
    assert all(2 <= len(chunk) <= size for chunk in chunks)
    assert all(len(chunk) == size for chunk in chunks[:-2])
    assert len(chunks) == -(-length // size)
