"""The run does not depend on how its batches are split, over how many ranks, packed or padded, interrupted or not.

Every run is a whole recipe on the demo's config, made small; the ranks are real gloo processes.
"""

from pathlib import Path

import pytest

from tests.launching import assert_same_state, metrics, run_here, run_on_ranks, training_state, without_time

SAVED = ("checkpoint.every_n_steps=6", "checkpoint.keep_last=1")
TIED = ("model.tie_embeddings=true", "jepa_every=2", "l2_anchor_weight=0.1")
SHUFFLED = ("shuffle_targets=true",)
ONE_BATCH, SMALL_BATCHES, PADDED = ("tokens_per_device=4000",), ("tokens_per_device=130",), ("packed=false",)
HALF = ("max_steps=3", "lr_scheduler.num_training_steps=6", "checkpoint.every_n_steps=3")
REST = ("resume=auto", "lr_scheduler.num_training_steps=6", "checkpoint.every_n_steps=3")
SAME_EVERYWHERE = ("epoch", "lr", "tokens", "masked_tokens", "sequences", "monitor_rows")
OF_THE_SPLIT = ("micro_batches", "padding")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    here = {
        "reference": (*ONE_BATCH, *SAVED),
        "small_batches": (*SMALL_BATCHES, *SAVED),
        "padded": (*PADDED, "tokens_per_device=300", *SAVED),
        "recomputed": ("enable_activation_checkpointing=true", *SAVED),
        "shuffled": (*SHUFFLED, *SAVED),
        "tied": (*TIED, *SAVED),
    }
    for name, overrides in here.items():
        run_here(directory / name, *overrides)
    on_two_ranks = {
        "two_ranks": (*ONE_BATCH, *SAVED),
        "two_ranks_small_batches": (*SMALL_BATCHES, *SAVED),
        "two_ranks_padded": (*PADDED, "tokens_per_device=300", *SAVED),
        "two_ranks_tied": (*TIED, *SAVED),
        "two_ranks_recomputed": ("enable_activation_checkpointing=true", *SAVED),
        "two_ranks_shuffled": (*SHUFFLED, *SMALL_BATCHES, *SAVED),
        "two_ranks_whole": ("checkpoint.every_n_steps=3",),
        "two_ranks_half": HALF,
    }
    run_on_ranks(2, {directory / name: list(overrides) for name, overrides in on_two_ranks.items()})
    run_on_ranks(4, {directory / "two_by_two_ranks": ["data_parallel_replicate_dim=2", *SAVED]})
    run_on_ranks(2, {directory / "two_ranks_half": list(REST)})
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
        ("two_ranks_small_batches", "reference"),
        ("two_ranks_padded", "reference"),
        ("two_by_two_ranks", "reference"),
        ("two_ranks_tied", "tied"),
        ("two_ranks_recomputed", "reference"),
        ("two_ranks_shuffled", "shuffled"),
    ],
)
def test_any_split_of_the_batch_is_the_same_run(runs: Path, run: str, reference: str) -> None:
    """Losses, gradient norms, collapse measures, and at the end online, predictor and EMA weights."""
    assert_same_run(runs / run, runs / reference, rel=1e-5)
    assert_same_weights(runs / run, runs / reference, rel=1e-5)


def test_the_runs_were_split_differently(runs: Path) -> None:
    counts = {run: metrics(runs / run)[0]["micro_batches"] for run in ("reference", "small_batches", "two_ranks")}
    assert counts["reference"] == counts["two_ranks"] == 1
    assert counts["small_batches"] > 3
    assert metrics(runs / "padded")[0]["padding"] > 0
    assert metrics(runs / "reference")[0]["padding"] == 0


def test_shuffled_targets_change_the_run(runs: Path) -> None:
    reference, shuffled = metrics(runs / "reference"), metrics(runs / "shuffled")
    assert reference[0]["diffusion_loss"] == shuffled[0]["diffusion_loss"]
    assert abs(reference[0]["jepa_loss"] - shuffled[0]["jepa_loss"]) > 1e-4


def test_resumed_on_two_ranks_is_bit_identical(runs: Path) -> None:
    resumed, whole = metrics(runs / "two_ranks_half"), metrics(runs / "two_ranks_whole")
    assert without_time(resumed) == without_time(whole)
    assert_same_state(runs / "two_ranks_half", runs / "two_ranks_whole", 6)


def test_a_rank_without_sequences_keeps_step(tmp_path: Path) -> None:
    """5 sequences that do not fit in pairs, on 2 ranks: the sixth micro-batch is empty."""
    lone = ("global_batch_size=5", "max_steps=2", "max_seq_len=64", "tokens_per_device=64", "monitor_every=1")
    expected = run_here(tmp_path / "one", *lone)
    run_on_ranks(2, {tmp_path / "two": list(lone)})
    rows = metrics(tmp_path / "two")
    assert [row["micro_batches"] for row in rows] == [3, 3]
    for row, reference in zip(rows, expected, strict=True):
        for key in ("loss", "jepa_loss", "grad_norm", "effective_rank", "cosine_diversity"):
            assert row[key] == pytest.approx(reference[key], rel=1e-5), key
        assert {key: row[key] for key in ("tokens", "sequences", "padding")} | {"padding": 0} == {
            key: reference[key] for key in ("tokens", "sequences", "padding")
        }
