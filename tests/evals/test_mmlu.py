"""Multiple choice in one token: prompts, exact scores of the letters, solved examples, rows that cannot be used."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from dllm_jepa.errors import CheckpointError, ConfigError, DataError
from dllm_jepa.evals.mmlu import mmlu_task
from dllm_jepa.models import MaskedDiffusionLM, Tokenizer
from dllm_jepa.models.dream import dream
from dllm_jepa.models.llada import llada
from dllm_jepa.models.tiny import tiny_tokenizer

SIZES = {"vocab_size": 512, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "mlp_dim": 48}
COLOURS = [
    {"question": "Snow is", "choices": ["black", "white", "red", "blue"], "answer": 1, "subject": "colours_of_things"},
    {"question": "Coal is", "choices": ["black", "white"], "answer": 0, "subject": "colours_of_things"},
    {"question": "2 + 2 =", "choices": ["3", "4", "5"], "answer": 1, "subject": "sums"},
]
SOLVED = [
    {"question": "1 + 1 =", "choices": ["2", "3"], "answer": 0, "subject": "sums"},
    {"question": "Grass is", "choices": ["blue", "green"], "answer": 1, "subject": "colours_of_things"},
    {"question": "Coal is", "choices": ["black", "white"], "answer": 0, "subject": "colours_of_things"},
    {"question": "Blood is", "choices": ["red", "green"], "answer": 0, "subject": "colours_of_things"},
    {"question": "1 + 2 =", "choices": ["2", "3"], "answer": 1, "subject": "sums"},
]


def write_rows(path: Path, rows: Iterable[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write_rows(tmp_path / "test.jsonl", COLOURS)


@pytest.fixture
def shots_source(tmp_path: Path) -> str:
    return write_rows(tmp_path / "dev.jsonl", SOLVED)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte-level BPE for which a letter with the blank before it is a token, as in the published ones."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([f"Answer: {letter}\n{letter}. {letter}" for letter in "ABCD"] * 9, trainer)
    backend.add_special_tokens(["<mask>", "<eos>", "<bos>"])
    return Tokenizer(backend, mask_token="<mask>", eos_token="<eos>", bos_token="<bos>")


@pytest.fixture(params=[llada, dream], ids=["llada", "dream"])
def model(request: pytest.FixtureRequest) -> MaskedDiffusionLM:
    torch.manual_seed(0)
    return request.param(**SIZES, max_seq_len=1024).eval()


def test_plain_prompt_is_the_customary_text(tokenizer: Tokenizer, source: str, shots_source: str) -> None:
    task = mmlu_task(tokenizer, source=source, shots_source=shots_source, num_shots=2, seed=0)
    assert task.prompts[0][0] == tokenizer.bos_id
    assert tokenizer.decode(task.prompts[0]) == (
        "The following are multiple choice questions (with answers) about colours of things.\n\n"
        "Grass is\nA. blue\nB. green\nAnswer: B\n\n"
        "Coal is\nA. black\nB. white\nAnswer: A\n\n"
        "Snow is\nA. black\nB. white\nC. red\nD. blue\nAnswer:"
    )
    # The example that is the question itself makes room for the next one.
    assert tokenizer.decode(task.prompts[1]) == (
        "The following are multiple choice questions (with answers) about colours of things.\n\n"
        "Grass is\nA. blue\nB. green\nAnswer: B\n\n"
        "Blood is\nA. red\nB. green\nAnswer: A\n\n"
        "Coal is\nA. black\nB. white\nAnswer:"
    )
    assert task.lengths == [len(prompt) + 1 for prompt in task.prompts]
    assert task.letter_ids == [tokenizer.encode(f" {letter}")[0] for letter in "ABCD"]
    assert task.remarks() == {"best_constant": {"answer": "B", "accuracy": 2 / 3}, "num_subjects": 2}
    # Shots show the very token that is scored.
    assert task.letter_ids[1] in task.prompts[0]


def test_chat_has_a_turn_for_each_example(source: str, shots_source: str) -> None:
    tokenizer = tiny_tokenizer()
    task = mmlu_task(tokenizer, source=source, shots_source=shots_source, num_shots=1, seed=0, template="chat")
    messages = [
        ("system", "The following are multiple choice questions (with answers) about sums."),
        ("user", "1 + 1 =\nA. 2\nB. 3\nAnswer:"),
        ("assistant", "A"),
        ("user", "2 + 2 =\nA. 3\nB. 4\nC. 5\nAnswer:"),
    ]
    chat = [{"role": role, "content": content} for role, content in messages]
    assert task.prompts[2] == tokenizer.encode_chat(chat, add_generation_prompt=True)[0]
    assert task.letter_ids == [tokenizer.encode(letter)[0] for letter in "ABCD"]


@pytest.mark.parametrize("num_shots", [0, 2])
def test_scores_are_those_of_one_row_at_a_time(
    model: MaskedDiffusionLM, tokenizer: Tokenizer, source: str, shots_source: str, num_shots: int
) -> None:
    task = mmlu_task(tokenizer, source=source, shots_source=shots_source, num_shots=num_shots, seed=0)
    results = task.evaluate(model, [2, 0, 1], batch_size=2)
    assert [result.item for result in results] == [2, 0, 1]
    assert [result.name for result in results] == [f"test.jsonl line {line}" for line in (3, 1, 2)]
    for result in results:
        row = COLOURS[result.item]
        with torch.no_grad():
            logits = model.token_logits(torch.tensor([[*task.prompts[result.item], tokenizer.mask_id]]))[0, -1]
        letters = "ABCD"[: len(row["choices"])]
        expected = {letter: logits.log_softmax(-1)[tokenizer.encode(f" {letter}")[0]].item() for letter in letters}
        assert result.record["log_probs"] == pytest.approx(expected, abs=1e-4)
        best = max(expected, key=expected.__getitem__)
        assert result.record["prediction"] == best and result.record["gold"] == letters[row["answer"]]
        assert result.record["subject"] == row["subject"] and result.num_tokens == 1
        assert result.score.measures == {
            "accuracy": best == letters[row["answer"]],
            "gold_log_prob": pytest.approx(expected[letters[row["answer"]]], abs=1e-4),
        }
        json.dumps(result.to_json())


def test_letters_that_tie_in_bf16_are_told_apart(model: MaskedDiffusionLM, tokenizer: Tokenizer, source: str) -> None:
    task = mmlu_task(tokenizer, source=source, num_shots=0, seed=0)
    half, (a, _, c, _) = model.bfloat16(), task.letter_ids
    tokens = torch.tensor([[*task.prompts[0], tokenizer.mask_id]])
    with torch.no_grad():
        state = half(tokens)[0, -2 if half.shift_logits else -1].float()
        # A gets a logit of about 20, where bf16 has steps of 0.125, and C 0.01 more.
        row = 20 * state / state.square().sum()
        row[0] = 0
        half.head.weight[[a, c]] = row.bfloat16()
        half.head.weight[c, 0] = 0.01 / state[0]
        rounded = half.token_logits(tokens)[0, -1]
        exact = state @ half.head.weight.float().T
    assert rounded[a] == rounded[c] == rounded.max() and 0.005 < exact[c] - exact[a] < 0.02
    (result,) = task.evaluate(half, [0], batch_size=1)
    assert result.record["prediction"] == "C"
    expected = exact.log_softmax(-1)[task.letter_ids].tolist()
    assert list(result.record["log_probs"].values()) == pytest.approx(expected, abs=1e-3)


def test_hub_datasets_have_their_own_split_of_examples(
    tokenizer: Tokenizer, shots_source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(path: str, name: str | None, *, split: str) -> list[dict[str, Any]]:
        asked.append((path, name, split))
        return SOLVED if split == "dev" else COLOURS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = mmlu_task(tokenizer, source="cais/mmlu", name="all", num_shots=1, seed=0)
    assert asked == [("cais/mmlu", "all", "test"), ("cais/mmlu", "all", "dev")]
    with_file = mmlu_task(tokenizer, source="cais/mmlu", name="all", shots_source=shots_source, num_shots=1, seed=0)
    assert task.prompts == with_file.prompts


def test_rows_without_a_subject(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "subject"} for row in COLOURS]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    task = mmlu_task(tokenizer, source=source, num_shots=1, shots_source=source, seed=0, max_items=2)
    assert tokenizer.decode(task.prompts[0]).startswith(
        "The following are multiple choice questions (with answers).\n\nCoal is\n"
    )
    assert len(task.lengths) == 2 and task.fingerprint()["num_items"] == 2


def test_fingerprints_tell_prompts_apart_and_not_places(
    tokenizer: Tokenizer, source: str, shots_source: str, tmp_path: Path
) -> None:
    same = write_rows(tmp_path / "same.jsonl", COLOURS)
    one, moved, other = (
        mmlu_task(tokenizer, source=path, shots_source=shots_source, split=split, num_shots=n, seed=0).fingerprint()
        for path, split, n in [(source, "test", 1), (same, "validation", 1), (source, "test", 2)]
    )
    assert one == moved and one["task"] == "mmlu"
    assert {key for key in one if one[key] != other[key]} == {"num_shots", "prompts_sha256"}
    json.dumps(one)


def test_prompts_that_do_not_fit_are_refused(tokenizer: Tokenizer, source: str, shots_source: str) -> None:
    task = mmlu_task(tokenizer, source=source, shots_source=shots_source, num_shots=2, seed=0)
    longest = max(task.lengths)
    task.check_context(longest)
    with pytest.raises(
        ConfigError, match=rf"test.jsonl line 1 needs {longest} tokens with num_shots=2.*lower num_shots"
    ):
        task.check_context(longest - 1)


def test_solved_examples_that_are_not_there(
    tokenizer: Tokenizer, source: str, shots_source: str, tmp_path: Path
) -> None:
    other = write_rows(tmp_path / "other.jsonl", SOLVED[1:4])
    few = write_rows(tmp_path / "few.jsonl", [*SOLVED[:4], SOLVED[0], SOLVED[4]])
    cases = [
        (
            {"num_shots": 3, "shots_source": shots_source},
            "num_shots=3, but .*dev.jsonl, subject 'sums', has only 2 rows",
        ),
        ({"num_shots": 3, "shots_source": few}, "num_shots=3, .*only 2 ask something else than the item 'Coal is"),
        ({"num_shots": 1, "shots_source": other}, "has no solved example for the subject 'sums' of test.jsonl line 3"),
        ({"num_shots": 1}, "task.shots_source: missing; with num_shots=1 .*test.jsonl is a file"),
    ]
    for arguments, message in cases:
        with pytest.raises(ConfigError, match=message):
            mmlu_task(tokenizer, source=source, seed=0, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": "black"}, "field 'choices' must be a list of texts, got 'black'"),
        ({"choices": []}, "there must be 2 to 26 choices, got 0"),
        ({"choices": ["x", "\ud800"]}, "field 'choices' holds half of a surrogate pair"),
        ({"answer": 2}, "field 'answer' must be the index of a choice, 0 to 1, got 2"),
        ({"answer": True}, "0 to 1, got True"),
        ({"answer": "B"}, "0 to 1, got 'B'"),
        ({"subject": 3}, "field 'subject' must be a text, got 3"),
        ({"answer": ...}, "has no field 'answer'; it has question, choices, subject"),
    ],
)
def test_rows_that_cannot_be_used(tokenizer: Tokenizer, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    row = {key: value for key, value in (COLOURS[1] | change).items() if value is not ...}
    source = write_rows(tmp_path / "rows.jsonl", [COLOURS[0], row])
    with pytest.raises(DataError, match=rf"^rows.jsonl line 2.*{message}"):
        mmlu_task(tokenizer, source=source, num_shots=0, seed=0)


def test_answers_that_are_not_a_token_of_their_own(
    tokenizer: Tokenizer, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="' A' is 2 tokens, .*' D' is 2 tokens: use template: chat"):
        mmlu_task(tiny_tokenizer(), source=source, num_shots=0, seed=0)
    monkeypatch.setattr(tokenizer, "encode", lambda text: [7])
    with pytest.raises(CheckpointError, match="two letters have the same token"):
        mmlu_task(tokenizer, source=source, num_shots=0, seed=0)


def test_options_out_of_range(tokenizer: Tokenizer, source: str) -> None:
    for option, message in [
        ({"num_shots": -1}, "num_shots must be 0 or more, got -1"),
        ({"max_items": 0}, "max_items must be at least 1, got 0"),
        ({"template": "html"}, "template must be chat or plain, got 'html'"),
    ]:
        with pytest.raises(ValueError, match=message):
            mmlu_task(tokenizer, source=source, seed=0, **({"num_shots": 0} | option))
