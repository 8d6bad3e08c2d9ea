"""Generation tasks: exact prompts, what is made of a canvas, fingerprints, and real decoding."""

import json
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from dllm_jepa import evals
from dllm_jepa.data import generate_regex_pairs
from dllm_jepa.errors import CheckpointError, ConfigError, DataError
from dllm_jepa.evals import EvalTask, GenerationTask
from dllm_jepa.evals._generation_task import item_seed
from dllm_jepa.generation import Generation, llada_decoding
from dllm_jepa.models import MaskedDiffusionLM, TransformerSizes
from dllm_jepa.models.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MODEL = torch.nn.Linear(1, 1)  # a canned decoding asks it for its device only
END_OF_TURN = max(TOKENIZER.end_ids - {TOKENIZER.eos_id})

ROWS = {
    "gsm8k": [{"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(5)],
    "django": [{"annotation": f"return {n}.", "code": f"return {n}"} for n in range(5)],
    "nlrx": [{"description": f"lines with {n}", "regex": f".*{n}.*"} for n in range(4)]
    + [{"description": "no line", "regex": "~(.*)"}],
    "spider": [
        {"db_id": "pets", "question": f"Pets above {n}?", "query": f"SELECT name FROM pet WHERE age > {n}"}
        for n in range(5)
    ],
}
TABLES = [
    {
        "db_id": "pets",
        "table_names_original": ["pet"],
        "column_names_original": [[-1, "*"], [0, "name"], [0, "age"]],
        "foreign_keys": [],
    }
]
BUILDERS: dict[str, Callable[..., GenerationTask]] = {
    "gsm8k": evals.gsm8k_task,
    "django": evals.django_task,
    "nlrx": evals.nlrx_task,
    "spider": evals.spider_task,
}


@dataclass(frozen=True)
class CannedDecoding:
    """Answers every prompt with the same text and some tokens behind it, and keeps what it was called with."""

    gen_length: int = 40
    steps: int = 8
    answer: ClassVar[str] = ""
    behind: ClassVar[tuple[int, ...]] = ()
    calls: ClassVar[list[dict[str, Any]]] = []

    def generate(self, model: torch.nn.Module, prompts: Sequence[Sequence[int]], **call: Any) -> Generation:
        assert model is MODEL
        self.calls.append({"prompts": prompts, **call})
        tokens = TOKENIZER.encode(self.answer)
        canvas = (tokens + list(self.behind) + TOKENIZER.encode("x") * self.gen_length)[: self.gen_length]
        num_tokens = next((at for at, token in enumerate(canvas) if token in call["stop_ids"]), self.gen_length)
        count = len(prompts)
        return Generation(torch.tensor([canvas] * count), [num_tokens] * count, [self.steps] * count)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[2:]))
        (tmp_path / f"{name}_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    (tmp_path / "tables.json").write_text(json.dumps(TABLES))
    (tmp_path / "databases" / "pets").mkdir(parents=True)
    with sqlite3.connect(tmp_path / "databases" / "pets" / "pets.sqlite") as connection:
        connection.execute("CREATE TABLE pet (name TEXT, age INTEGER)")
        connection.executemany("INSERT INTO pet VALUES (?, ?)", [(f"pet {age}", age) for age in range(9)])
    connection.close()
    return tmp_path


def build(name: str, folder: Path, decoding: Any = None, **options: Any) -> GenerationTask:
    sources = {"source": f"{folder}/{name}.jsonl", "shots_source": f"{folder}/{name}_train.jsonl"}
    if name == "spider":
        sources |= {"tables": f"{folder}/tables.json", "databases": f"{folder}/databases"}
    return BUILDERS[name](TOKENIZER, decoding or CannedDecoding(), progress=False, **(sources | options))


def text(task: GenerationTask, item: int) -> str:
    return TOKENIZER.decode(task.prompts[item], skip_special_tokens=False)


def evaluate(task: GenerationTask, answer: str, behind: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(CannedDecoding, "answer", answer)
    monkeypatch.setattr(CannedDecoding, "behind", behind)
    monkeypatch.setattr(CannedDecoding, "calls", [])
    return task.evaluate(MODEL, range(len(task.rows)), batch_size=2)


# Prompts


def test_prompts_in_both_templates(folder: Path) -> None:
    chat = text(build("django", folder, num_shots=1), 1)
    assert chat == (
        "<|startoftext|><|system|>Convert natural language to Python code.<|end|><|user|>return 0.<|end|>"
        "<|assistant|>return 0<|end|><|user|>return 3.<|end|><|assistant|>"
    )
    plain = text(build("django", folder, num_shots=1, template="plain", system_prompt="Go."), 1)
    assert plain == "<|startoftext|>Go.\n\nreturn 0.\nreturn 0\n\nreturn 3.\n"
    assert text(build("nlrx", folder, template="plain", system_prompt=""), 0) == "<|startoftext|>lines with 2\n"
    spider = text(build("spider", folder, num_shots=1, schema_in_prompt=True, template="plain", system_prompt=""), 1)
    question = "For db_id:[pets]\n\npet(name, age)\n\nPets above {}?\n"
    assert spider == (f"<|startoftext|>{question.format(0)}SELECT name FROM pet WHERE age > 0\n\n{question.format(3)}")


@pytest.mark.parametrize("name", BUILDERS)
def test_no_prompt_holds_its_own_answer(folder: Path, name: str) -> None:
    # The third training row is the first item.
    task = build(name, folder, num_shots=2, shots="seeded", template="plain")
    for item, row in enumerate(task.rows):
        assert text(task, item).count(row.values[task.prompt_format.task.fields[-2]]) == 1
    with pytest.raises(ConfigError, match=r"num_shots=3, but of the 3 rows .* only 2 ask something else"):
        build(name, folder, num_shots=3)


def test_max_items_takes_the_first_ones(folder: Path) -> None:
    assert [row.name for row in build("gsm8k", folder, max_items=2).rows] == [
        "gsm8k.jsonl line 1",
        "gsm8k.jsonl line 2",
    ]
    assert len(build("gsm8k", folder, max_items=99).rows) == 3
    with pytest.raises(ValueError, match="max_items must be 1 or more, got 0"):
        build("gsm8k", folder, max_items=0)


def test_context_that_is_too_small_names_the_longest_item(folder: Path) -> None:
    long_row = json.dumps({"annotation": "return " + "x" * 200, "code": "return x"})
    with (folder / "django.jsonl").open("a") as file:
        file.write(long_row + "\n")
    task = build("django", folder)
    assert task.lengths == [len(prompt) + 40 for prompt in task.prompts]
    longest = max(task.lengths)
    task.check_context(longest)
    expected = (
        rf"django.jsonl line 4 needs {longest} tokens, {longest - 40} for the prompt and 40 .*"
        rf"context is {longest - 1}: lower decoding.gen_length"
    )
    with pytest.raises(ConfigError, match=expected):
        task.check_context(longest - 1)
    with pytest.raises(ConfigError, match="the prompt alone is too long: take a shorter system prompt"):
        task.check_context(longest - 40)
    with pytest.raises(ConfigError, match="lower num_shots or decoding.gen_length"):
        build("django", folder, num_shots=1).check_context(longest - 40)


# Gold responses


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("gsm8k", {"question": "?", "answer": "It is 3."}, "^gsm8k.jsonl line 4: field 'answer' has no `#### number`"),
        ("django", {"annotation": "?", "code": " "}, "^django.jsonl line 4: field 'code' is blank"),
        ("nlrx", {"description": "?", "regex": "("}, r"^nlrx.jsonl line 4: field 'regex' is '\('"),
        ("spider", {"db_id": "pets", "question": "?"}, "^spider.jsonl line 4 has no field 'query'"),
        ("spider", {"db_id": "dogs", "question": "?", "query": "SELECT 1"}, "lacks 1 of the 2 databases: dogs"),
    ],
)
def test_a_row_without_a_gold_response_is_refused_before_any_model(
    folder: Path, name: str, row: dict[str, str], expected: str
) -> None:
    with (folder / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=expected):
        build(name, folder)


def test_a_chat_template_without_chat_tokens_is_refused(folder: Path) -> None:
    class BaseTokenizer(type(TOKENIZER)):  # type: ignore[misc]
        def encode_chat(self, *args: Any, **options: Any) -> Any:
            raise CheckpointError("this is the tokenizer of a base model: use `template: plain`")

    tokenizer = tiny_tokenizer()
    tokenizer.__class__ = BaseTokenizer
    with pytest.raises(CheckpointError, match="template: plain"):
        evals.django_task(tokenizer, CannedDecoding(), source=f"{folder}/django.jsonl")
    with pytest.raises(ValueError, match="template must be chat or plain, got 'xml'"):
        build("django", folder, template="xml")


def test_spider_says_what_to_download_and_which_key_is_missing(folder: Path) -> None:
    download = r"https://yale-lily.github.io/spider: unpack it and set task.databases"
    with pytest.raises(ConfigError, match=rf"^task.databases: null given, .*{download}"):
        build("spider", folder, databases=None)
    with pytest.raises(DataError, match=rf"nowhere, which does not exist, lacks 1 of the 1 .*{download}"):
        build("spider", folder, databases=f"{folder}/nowhere")
    with pytest.raises(ConfigError, match="task.tables: missing; with schema_in_prompt"):
        build("spider", folder, tables=None, schema_in_prompt=True)


# Results


@pytest.mark.parametrize("name", BUILDERS)
def test_gold_responses_score_as_right(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = build(name, folder)
    for item, row in enumerate(task.rows):
        gold = row.values[task.prompt_format.task.response_field]
        result = evaluate(task, gold, (END_OF_TURN,), monkeypatch)[item]
        assert all(value in (True, None) for value in result.score.measures.values()) and result.score.value is True
        assert (result.item, result.name, result.num_tokens) == (item, row.name, len(TOKENIZER.encode(gold)))
        assert result.record == {
            "question": task.prompt_format.task.question(row.values),
            "prompt": text(task, item),
            "prediction": gold,
            "gold": gold,
            "finished": True,
            "num_passes": 8,
        }


@pytest.mark.parametrize("end", sorted(TOKENIZER.end_ids))
def test_a_response_ends_at_the_first_end_token(folder: Path, end: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Other special tokens stay visible.
    behind = (TOKENIZER.bos_id, end, *TOKENIZER.encode(" wrong"), TOKENIZER.eos_id)
    result = evaluate(build("django", folder), "return 2", behind, monkeypatch)[0]
    assert result.record["prediction"] == "return 2<|startoftext|>"
    assert result.score.measures == {"prefix_match": True, "exact_match": False}
    json.dumps(result.to_json())


@pytest.mark.parametrize(("template", "is_plain"), [("plain", True), ("chat", False)])
def test_a_response_without_an_end_token(
    folder: Path, template: str, is_plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not finished; in plain text a blank line, behind which a base model goes on, is an end too."""
    behind = TOKENIZER.encode("\n\nanother question\n")
    result = evaluate(build("django", folder, template=template), "return 2", behind, monkeypatch)[0]
    assert (result.record["prediction"] == "return 2") is result.record["finished"] is is_plain
    assert result.score.measures == {"prefix_match": True, "exact_match": is_plain} and result.num_tokens == 40


def test_the_decoding_gets_batches_ids_and_a_seed_per_item(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = build("django", folder, seed=5)
    evaluate(task, "x", (), monkeypatch)
    first, second = CannedDecoding.calls
    assert first["prompts"] == task.prompts[:2] and second["prompts"] == task.prompts[2:]
    assert first["seeds"] == [item_seed(5, 0), item_seed(5, 1)] and second["seeds"] == [item_seed(5, 2)]
    assert (first["mask_id"], first["pad_id"]) == (TOKENIZER.mask_id, TOKENIZER.pad_id)
    assert first["token_ids"] == TOKENIZER.token_ids and set(first["stop_ids"]) == TOKENIZER.end_ids
    assert first["device"] == torch.device("cpu")


# Facts and remarks


def test_facts_change_with_everything_that_may_change_a_result(folder: Path) -> None:
    (folder / "other.jsonl").write_text(json.dumps(ROWS["nlrx"][0]) + "\n" + json.dumps(ROWS["nlrx"][1]) + "\n")
    sampler = {"gen_length": 40, "block_length": 8, "steps": 40}
    changes: list[dict[str, Any]] = [
        {},
        {"num_shots": 1},
        {"num_shots": 1, "shots_source": f"{folder}/nlrx.jsonl"},
        {"seed": 1},
        {"max_items": 2},
        {"template": "plain"},
        {"system_prompt": ""},
        {"dialect": "brics"},
        {"source": f"{folder}/other.jsonl"},
        {"decoding": CannedDecoding(gen_length=41)},
        {"decoding": llada_decoding(**sampler, threshold=0.9)},
        {"decoding": llada_decoding(**sampler, factor=0.9)},
    ]
    facts = [json.dumps(build("nlrx", folder, **change).fingerprint()) for change in changes]
    assert len(set(facts)) == len(changes)
    assert json.dumps(build("nlrx", folder).fingerprint()) == facts[0]


def test_what_each_change_shows_in(folder: Path) -> None:
    def changed(name: str, change: Callable[[], object], **options: Any) -> set[str]:
        before = build(name, folder).fingerprint()
        change()
        after = build(name, folder, **options).fingerprint()
        return {key for key in before if before[key] != after[key]}

    gold, database = folder / "django.jsonl", folder / "databases" / "pets" / "pets.sqlite"
    # The data are the same whatever the prompts.
    assert "data_sha256" not in changed("nlrx", lambda: None, num_shots=1, template="plain")
    edited = gold.read_text().replace('"return 4"', '"return  4"')
    assert changed("django", lambda: gold.write_text(edited)) == {"data_sha256"}
    assert changed("spider", lambda: database.write_bytes(database.read_bytes() + b"\0")) == {"databases"}


@pytest.mark.parametrize("from_code_fence", [False, True])
def test_a_query_in_a_code_fence(folder: Path, from_code_fence: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    task = build("spider", folder, from_code_fence=from_code_fence, decoding=CannedDecoding(gen_length=120))
    fenced = f"It is\n```sql\n{ROWS['spider'][2]['query']};\n```\nas asked."
    result = evaluate(task, fenced, (END_OF_TURN,), monkeypatch)[0]
    assert result.score.value is from_code_fence and result.record["prediction"] == fenced
    assert task.fingerprint().get("from_code_fence", False) is from_code_fence


def test_remarks_of_regexes(folder: Path) -> None:
    remarks = build("nlrx", folder).remarks()
    assert remarks["golds_that_match_nothing"] == pytest.approx(1 / 3)
    assert remarks["best_constant"]["functional_match"] == pytest.approx(1 / 3)
    assert "NL-RX-Synth" in remarks["ceiling"]
    assert "ceiling" not in evals.regex_pairs_task(TOKENIZER, CannedDecoding(), num_pairs=3).remarks()


# The built-in pairs, and real decoding


def test_built_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    task = evals.regex_pairs_task(TOKENIZER, CannedDecoding(), num_pairs=6, num_shots=2, data_seed=3, max_items=4)
    pairs = generate_regex_pairs(num_pairs=6, seed=3, split="heldout")
    assert [dict(row.values) for row in task.rows] == pairs[:4]
    for pair in generate_regex_pairs(num_pairs=2, seed=3, split="train"):
        assert f"<|user|>{pair['description']}<|end|><|assistant|>{pair['regex']}<|end|>" in text(task, 0)
    assert evaluate(task, pairs[1]["regex"], (TOKENIZER.eos_id,), monkeypatch)[1].score.value is True
    train = evals.regex_pairs_task(TOKENIZER, CannedDecoding(), num_pairs=1, num_shots=1, split="train")
    assert text(train, 0).count(train.rows[0].values["description"]) == 1


@pytest.fixture(scope="module")
def model() -> MaskedDiffusionLM:
    torch.manual_seed(0)
    sizes = TransformerSizes(TOKENIZER.vocab_size, 32, 2, 2, 2, 64, 256, 10_000.0, 1e-5)
    return MaskedDiffusionLM(sizes, family="llada", shift_logits=False, attn_bias=False).eval()


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "remasking": "random"}], ids=["greedy", "random"])
def test_results_do_not_depend_on_the_batches(model: MaskedDiffusionLM, options: dict[str, Any]) -> None:
    decoding = llada_decoding(gen_length=8, block_length=4, steps=8, **options)
    task: EvalTask = evals.regex_pairs_task(TOKENIZER, decoding, num_pairs=7, progress=False)
    together = task.evaluate(model, range(7), batch_size=7)
    assert [result.item for result in together] == list(range(7))
    others = task.evaluate(model, [5, 0, 3, 6], batch_size=3)
    assert others == [together[item] for item in (5, 0, 3, 6)]
    again = replace(task, seed=1).evaluate(model, range(7), batch_size=7)
    assert (again == together) is (not options)
