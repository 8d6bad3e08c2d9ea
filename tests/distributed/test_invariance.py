"""The run does not depend on how its batches are split, over how many ranks, packed or padded, interrupted or not.

Every run is a whole recipe on the demo's config, made small; the ranks are real gloo processes.
"""

from pathlib import Path

import pytest

from tests.launching import assert_same_state, copy_up_to, metrics, run_here, run_on_ranks, training_state, without_time

SAVED = ("checkpoint={every_n_steps: 3, keep_last: null}",)
TIED = ("model.tie_embeddings=true", "jepa_every=2", "l2_anchor_weight=0.1")
SHUFFLED = ("shuffle_targets=true",)
RECOMPUTED = ("enable_activation_checkpointing=true",)
SMALL_BATCHES, PADDED = ("tokens_per_device=130",), ("tokens_per_device=160", "packed=false")
# 5 sequences that do not fit in pairs, on 2 ranks: the sixth micro-batch is empty.
LONE = ("global_batch_size=5", "max_steps=2", "max_seq_len=64", "tokens_per_device=64", "monitor_every=1")
SAME_EVERYWHERE = ("epoch", "lr", "tokens", "masked_tokens", "sequences", "monitor_rows")
OF_THE_SPLIT = ("micro_batches", "padding")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    here = {
        "reference": (),
        "small_batches": SMALL_BATCHES,
        "padded": PADDED,
        "recomputed": RECOMPUTED,
        "shuffled": SHUFFLED,
        "tied": TIED,
        "lone": LONE,
    }
    for name, overrides in here.items():
        run_here(directory / name, *overrides, *SAVED)
    on_two_ranks = {
        "two_ranks": (),
        "two_ranks_padded": (*PADDED, *RECOMPUTED),
        "two_ranks_tied": TIED,
        "two_ranks_shuffled": (*SHUFFLED, *SMALL_BATCHES),
        "two_ranks_lone": LONE,
    }
    run_on_ranks(2, {directory / name: [*overrides, *SAVED] for name, overrides in on_two_ranks.items()})
    run_on_ranks(4, {directory / "two_by_two_ranks": ["data_parallel_replicate_dim=2", *SAVED]})
    copy_up_to(directory / "two_ranks", directory / "two_ranks_resumed", step=3)
    run_on_ranks(2, {directory / "two_ranks_resumed": [*SAVED, "resume=auto"]})
    return directory


def assert_same_run(run: Path, reference: Path, rel: float) -> None:
    rows, expected_rows = without_time(metrics(run)), without_time(metrics(reference))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row.keys() == expected.keys()
        for key in row.keys() - {*OF_THE_SPLIT}:
            assert row[key] == pytest.approx(expected[key], rel=0 if key in SAME_EVERYWHERE else rel, abs=0), key


def assert_same_weights(run: Path, reference: Path, rel: float) -> None:
    state, expected = training_state(run, 6), training_state(reference, 6)
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        if name.startswith("optimizer"):
            continue  # second moments square the rounding of the gradients; the weights that they make are compared
        difference = (tensor - expected[name]).norm() / expected[name].norm().clamp(min=1e-30)
        assert difference <= rel, f"{name}: {difference}"


@pytest.mark.parametrize(
    ("run", "reference"),
    [
        ("small_batches", "reference"),
        ("padded", "reference"),
        ("recomputed", "reference"),
        ("two_ranks", "reference"),
        ("two_ranks_padded", "reference"),
        ("two_by_two_ranks", "reference"),
        ("two_ranks_tied", "tied"),
        ("two_ranks_shuffled", "shuffled"),
    ],
)
def test_any_split_of_the_batch_is_the_same_run(runs: Path, run: str, reference: str) -> None:
    """Losses, gradient norms, collapse measures, and at the end online, predictor and EMA weights."""
    assert_same_run(runs / run, runs / reference, rel=1e-5)
    assert_same_weights(runs / run, runs / reference, rel=1e-5)


def test_the_runs_were_split_differently(runs: Path) -> None:
    counts = {path.name: metrics(path)[0]["micro_batches"] for path in runs.iterdir()}
    assert counts["reference"] == counts["two_ranks"] == counts["shuffled"] == 1
    assert counts["small_batches"] > 3 and counts["two_ranks_padded"] > 1 and counts["two_ranks_shuffled"] > 1
    assert metrics(runs / "padded")[0]["padding"] > 0
    assert metrics(runs / "reference")[0]["padding"] == 0


def test_shuffled_targets_change_the_run(runs: Path) -> None:
    reference, shuffled = metrics(runs / "reference"), metrics(runs / "shuffled")
    assert reference[0]["diffusion_loss"] == shuffled[0]["diffusion_loss"]
    assert abs(reference[0]["jepa_loss"] - shuffled[0]["jepa_loss"]) > 1e-4


def test_resumed_on_two_ranks_is_bit_identical(runs: Path) -> None:
    assert without_time(metrics(runs / "two_ranks_resumed")) == without_time(metrics(runs / "two_ranks"))
    assert_same_state(runs / "two_ranks_resumed", runs / "two_ranks", 6)


def test_a_rank_without_sequences_keeps_step(runs: Path) -> None:
    rows, expected = metrics(runs / "two_ranks_lone"), metrics(runs / "lone")
    assert [row["micro_batches"] for row in rows] == [3, 3]
    for row, reference in zip(rows, expected, strict=True):
        for key in ("loss", "jepa_loss", "grad_norm", "effective_rank", "cosine_diversity"):
            assert row[key] == pytest.approx(reference[key], rel=1e-5), key
        assert (row["tokens"], row["sequences"]) == (reference["tokens"], reference["sequences"])
