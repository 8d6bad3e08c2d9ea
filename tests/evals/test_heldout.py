"""Held-out loss: the estimator in closed form, masks that two models share, chunks and text sources."""

import copy
import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from dllm_jepa.errors import ConfigError, DataError
from dllm_jepa.evals.heldout import HeldoutTask, _score, heldout_task
from dllm_jepa.models import MaskedDiffusionLM, Tokenizer
from dllm_jepa.models.dream import dream
from dllm_jepa.models.llada import llada
from dllm_jepa.models.tiny import tiny_tokenizer
from tests.evals.toy_models import CountingModel, RecordingModel

SIZES = {"vocab_size": 512, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "mlp_dim": 48}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {number} of the text, with a number {number * 7}\n" for number in range(40)))
    return path


def small_model(family: str = "llada", seed: int = 0) -> MaskedDiffusionLM:
    torch.manual_seed(seed)
    return {"llada": llada, "dream": dream}[family](**SIZES, max_seq_len=64).eval()


def toy_task(tokenizer: Tokenizer, num_tokens: int, num_strata: int, seed: int = 0) -> HeldoutTask:
    """Chunks of the token 1, as `CountingModel` scores it, behind a token that is never masked."""
    return HeldoutTask([[0] + [1] * num_tokens] * 3, tokenizer, num_strata, seed, 0)


def log_odds(num_masked: int) -> float:
    return 3.0 - 0.5 * num_masked


def loss_at(num_masked: int) -> float:
    """Cross-entropy of the token 1, whose log-odds those are."""
    return math.log1p(math.exp(-log_odds(num_masked)))


def test_as_many_strata_as_tokens_give_the_bound_itself(tokenizer: Tokenizer) -> None:
    """One stratum for each number of masked tokens l: loss = 1/L sum_l (L/l) (l CE(l)) / L."""
    task = toy_task(tokenizer, 10, num_strata=10)
    model = CountingModel(log_odds, mask_id=tokenizer.mask_id, vocab_size=512)
    (result,) = task.evaluate(model, [1], batch_size=3)
    expected = [loss_at(num_masked) for num_masked in range(1, 11)]
    measures = {"loss": sum(expected) / 10}
    measures |= {
        f"loss_{name}": sum(expected[band]) / 2
        for name, band in {
            "0.0_0.2": slice(0, 2),
            "0.2_0.4": slice(2, 4),
            "0.4_0.6": slice(4, 6),
            "0.6_0.8": slice(6, 8),
            "0.8_1.0": slice(8, 10),
        }.items()
    }
    assert list(result.score.measures) == list(measures) and result.score.value == result.score.measures["loss"]
    assert result.score.measures == pytest.approx(measures, rel=1e-5)
    assert result.num_tokens == sum(range(1, 11)) and result.item == 1


def test_the_estimate_is_unbiased_and_strata_take_out_its_noise(tokenizer: Tokenizer) -> None:
    model = CountingModel(log_odds, mask_id=tokenizer.mask_id, vocab_size=512)
    exact = sum(loss_at(num_masked) for num_masked in range(1, 11)) / 10

    def spread(num_strata: int) -> tuple[float, float]:
        losses = torch.tensor(
            [
                result.score.measures["loss"]
                for seed in range(40)
                for result in toy_task(tokenizer, 10, num_strata, seed).evaluate(model, [0, 1, 2], batch_size=12)
            ],
            dtype=torch.float64,
        )
        return float(losses.mean()), float(losses.std())

    mean, std = spread(4)
    assert abs(mean - exact) < 4 * std / math.sqrt(120)
    # One stratum is a single draw of the number of masked tokens.
    _, std_of_one = spread(1)
    assert 0 < std < 0.4 * std_of_one / math.sqrt(4)


def test_bands_are_closed_above() -> None:
    for num_masked in range(1, 512):
        _, *bands = _score([num_masked], [1.0], 511).measures.values()
        ratio = Fraction(num_masked, 511)
        assert bands == [1.0 if Fraction(b, 5) < ratio <= Fraction(b + 1, 5) else None for b in range(5)]


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_masks_are_the_same_for_any_model_batch_and_process(tokenizer: Tokenizer, text: Path, family: str) -> None:
    task = heldout_task(tokenizer, source=str(text), chunk_tokens=32, num_strata=4, seed=0)
    model, other = RecordingModel(small_model(family)), RecordingModel(small_model(family, seed=1))
    results = task.evaluate(model, [3, 0, 5], batch_size=5)
    again = heldout_task(tokenizer, source=str(text), chunk_tokens=32, num_strata=4, seed=0, max_items=6)
    others = [again.evaluate(other, [item], batch_size=2)[0] for item in (3, 0, 5)]
    rows, rows_of_other = (torch.cat([tokens for tokens, _ in m.calls]) for m in (model, other))
    assert torch.equal(rows, rows_of_other)
    assert all(abs(a.score.value - b.score.value) > 1e-4 for a, b in zip(results, others, strict=True))
    # The first token is visible in every row, and only masked positions are scored.
    masked = rows == tokenizer.mask_id
    assert not masked[:, 0].any() and (rows[:, 0] == tokenizer.bos_id).all()
    assert sum(len(positions) for _, positions in model.calls) == int(masked.sum())
    assert [result.num_tokens for result in results] == masked.view(3, 4, 32).sum((1, 2)).tolist()
    # The same model again: not a rounding error of difference.
    assert [r.to_json() for r in task.evaluate(small_model(family), [3, 0, 5], batch_size=5)] == [
        r.to_json() for r in results
    ]


def test_masks_depend_on_seed_chunk_and_text(tokenizer: Tokenizer, text: Path) -> None:
    def masks(seed: int, item: int, chunk: list[int]) -> list[list[int]]:
        task = HeldoutTask([chunk] * 2, tokenizer, 4, seed, 0)
        return [list(row.masked) for row in task._rows(item)]

    chunk = list(range(40))
    assert masks(0, 0, chunk) == masks(0, 0, chunk)
    different = [masks(0, 0, chunk), masks(1, 0, chunk), masks(0, 1, chunk), masks(0, 0, [*chunk[:-1], 99])]
    assert all(one != other for number, one in enumerate(different) for other in different[:number])


def test_loss_is_that_of_a_plain_loop(tokenizer: Tokenizer, text: Path) -> None:
    task = heldout_task(tokenizer, source=str(text), chunk_tokens=20, num_strata=3, seed=0)
    model = small_model("dream")
    (result,) = task.evaluate(model, [2], batch_size=2)
    recorder = RecordingModel(model)
    task.evaluate(recorder, [2], batch_size=1)
    clean = torch.tensor(task.chunks[2])
    losses = []
    for tokens, _ in recorder.calls:
        masked = tokens[0] == tokenizer.mask_id
        with torch.no_grad():
            log_probs = model.token_logits(tokens)[0].double().log_softmax(-1)
        total = -sum(log_probs[at, clean[at]] for at in masked.nonzero().flatten())
        losses.append(float((19 / masked.sum()) * total / 19))
    assert result.score.value == pytest.approx(sum(losses) / 3, rel=1e-6)


def test_text_is_cut_into_whole_chunks(tokenizer: Tokenizer, text: Path, tmp_path: Path) -> None:
    task = heldout_task(tokenizer, source=str(text), chunk_tokens=32, seed=0)
    token_ids = tokenizer.encode(text.read_text())
    cut = [token_ids[start : start + 31] for start in range(0, len(token_ids), 31)]
    left_out = 0 if len(cut[-1]) == 31 else len(cut.pop())
    assert task.chunks == [[tokenizer.bos_id, *chunk] for chunk in cut] and task.lengths == [32] * len(cut)
    assert task.remarks()["tokens_left_out_at_the_end"] == left_out > 0
    # The same lines as rows of a file are the same text.
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"body": line}) + "\n" for line in text.read_text().splitlines()))
    from_rows = heldout_task(tokenizer, source=str(rows), field="body", chunk_tokens=32, seed=0, max_items=2)
    assert from_rows.chunks == task.chunks[:2]
    facts = task.fingerprint()
    same = tmp_path / "same.txt"
    same.write_bytes(text.read_bytes())
    moved = heldout_task(tokenizer, source=str(same), split="validation", chunk_tokens=32, seed=0)
    assert moved.fingerprint() == facts
    assert facts["task"] == "heldout" and facts["num_items"] == len(cut)
    assert facts["data_sha256"] != from_rows.fingerprint()["data_sha256"]
    json.dumps(facts)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_losses_in_bf16_are_those_of_fp32(tokenizer: Tokenizer, text: Path, family: str) -> None:
    task = heldout_task(tokenizer, source=str(text), chunk_tokens=32, num_strata=8, seed=0)
    exact, rounded = (
        task.evaluate(m, [0, 1], batch_size=4) for m in (small_model(family), small_model(family).bfloat16())
    )
    for one, other in zip(exact, rounded, strict=True):
        assert other.score.measures == pytest.approx(one.score.measures, rel=1e-2)


def test_without_a_bos_the_first_token_of_the_text_is_never_masked(tokenizer: Tokenizer, text: Path) -> None:
    plain = copy.copy(tokenizer)
    plain.bos_id = None
    task = heldout_task(plain, source=str(text), chunk_tokens=32, num_strata=8, seed=0)
    assert task.chunks[1] == tokenizer.encode(text.read_text())[32:64]
    masked = {position for item in range(9) for row in task._rows(item) for position in row.masked}
    assert masked == set(range(1, 32))


def test_chunks_that_do_not_fit_are_refused(tokenizer: Tokenizer, text: Path) -> None:
    task = heldout_task(tokenizer, source=str(text), chunk_tokens=32, seed=0)
    task.check_context(32)
    with pytest.raises(ConfigError, match="task.chunk_tokens: 32 given, but the model's context is 31: lower it"):
        task.check_context(31)


def test_sources_that_cannot_be_used(tokenizer: Tokenizer, text: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.txt"
    broken.write_bytes(b"fine\nnot \xff fine\n")
    cases = [
        ({"source": str(broken)}, r"broken.txt line 2 is not UTF-8 \(byte 10 of the file\)"),
        ({"source": str(tmp_path / "none.txt")}, "none.txt does not exist"),
        ({"source": str(text), "name": "main"}, "text.txt is a file: `name`"),
        ({"source": str(text), "chunk_tokens": 5000}, r"fewer than the 4999 of one chunk \(chunk_tokens=5000\)"),
    ]
    (tmp_path / "README.md").write_text("plain text")
    message = "README.md must be named .txt if it is plain text, or .jsonl or .json if it has one object per line"
    cases.append(({"source": str(tmp_path / "README.md")}, message))
    (tmp_path / "folder.txt").mkdir()
    cases.append(({"source": str(tmp_path / "folder.txt")}, "folder.txt cannot be read: Is a directory"))
    for arguments, message in cases:
        with pytest.raises(DataError, match=message):
            heldout_task(tokenizer, seed=0, **arguments)
    for key, value, least in [("chunk_tokens", 1, 2), ("num_strata", 0, 1), ("max_items", 0, 1)]:
        with pytest.raises(ValueError, match=f"{key} must be at least {least}, got {value}"):
            heldout_task(tokenizer, source=str(text), seed=0, **{key: value})
