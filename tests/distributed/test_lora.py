"""LoRA, DoRA and QLoRA on gloo ranks: the run of one process, whatever the split, resumed or not."""

from pathlib import Path

import pytest
import torch

from tests.launching import (
    SMALL_LORA,
    assert_same_state,
    copy_up_to,
    metrics,
    run_here,
    run_on_ranks,
    training_state,
    without_time,
)

RECIPE = "dllm_jepa_lora"
WIDE = ("model.embed_dim=256", "model.mlp_dim=256", "model.num_layers=1")  # two halves of whole blocks of NF4
KINDS = {
    "lora": (),
    "dora": ("model.use_dora=true",),
    "quantized": (*WIDE, "model.quantize_base=true"),
}
NARROW = ("model.embed_dim=128", "model.mlp_dim=128", "model.num_layers=1", "model.quantize_base=true")
SMALL_BATCHES = ("tokens_per_device=130",)
DROPOUT = ("model.lora_dropout=0.1",)
ON_TWO_RANKS = {
    "lora": (),
    "dora": (*KINDS["dora"], *SMALL_BATCHES),
    "quantized": (*KINDS["quantized"], *SMALL_BATCHES),
    "dropout": DROPOUT,
}
RESUMED = {kind: ON_TWO_RANKS[kind] for kind in ("dora", "quantized", "dropout")}
SAVED = ("max_steps=4", "checkpoint={every_n_steps: 2, keep_last: null}")
SAME_EVERYWHERE = ("epoch", "lr", "tokens", "masked_tokens", "sequences", "monitor_rows")
OF_THE_SPLIT = ("micro_batches", "padding")


def here(output_dir: Path, *overrides: str) -> None:
    run_here(output_dir, *overrides, *SAVED, recipe=RECIPE, base=SMALL_LORA)


def on_two_ranks(runs: dict[Path, tuple[str, ...]]) -> None:
    with_saves = {output_dir: [*overrides, *SAVED] for output_dir, overrides in runs.items()}
    run_on_ranks(2, with_saves, recipe=RECIPE, base=SMALL_LORA)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps each; those that are resumed go on from what the same run would have left if it had died at step 2."""
    directory = tmp_path_factory.mktemp("runs")
    for kind, overrides in KINDS.items():
        here(directory / kind, *overrides)
    on_two_ranks({directory / f"{kind}_two": overrides for kind, overrides in ON_TWO_RANKS.items()})
    again = {f"{kind}_resumed": (*overrides, "resume=auto") for kind, overrides in RESUMED.items()}
    again |= {"lora_one_to_two": ("resume=auto",), "refused": NARROW}
    copy_up_to(directory / "lora", directory / "lora_one_to_two", step=2)
    copy_up_to(directory / "quantized_two", directory / "quantized_two_to_one", step=2)
    for kind in RESUMED:
        copy_up_to(directory / f"{kind}_two", directory / f"{kind}_resumed", step=2)
    with pytest.raises(AssertionError) as failure:  # the last run of this launch is refused, and starting ranks is slow
        on_two_ranks({directory / name: overrides for name, overrides in again.items()})
    (directory / "refusal.txt").write_text(str(failure.value))
    here(directory / "quantized_two_to_one", *KINDS["quantized"], "resume=auto")
    return directory


def assert_same_run(run: Path, reference: Path) -> None:
    """Losses, gradient norms and collapse measures, and at the end adapters, predictor and averages."""
    rows, expected_rows = without_time(metrics(run)), without_time(metrics(reference))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row.keys() == expected.keys()
        for key in row.keys() - {*OF_THE_SPLIT}:
            assert row[key] == pytest.approx(expected[key], rel=0 if key in SAME_EVERYWHERE else 1e-5, abs=0), key
    state, expected_state = training_state(run, 4), training_state(reference, 4)
    assert state.keys() == expected_state.keys()
    compared = [name for name in state if name.startswith(("trained.model.", "trained.predictor.", "target."))]
    assert any(name.endswith("lora_b.weight") for name in compared)
    for name in compared:
        difference = (state[name] - expected_state[name]).norm() / expected_state[name].norm()
        assert difference <= 1e-5, f"{name}: {difference}"


@pytest.mark.parametrize("variant", [*(f"{kind}_two" for kind in KINDS), "quantized_two_to_one", "lora_one_to_two"])
def test_any_number_of_ranks_is_the_same_run(runs: Path, variant: str) -> None:
    assert_same_run(runs / variant, runs / variant.partition("_")[0])


def test_the_runs_were_split_differently(runs: Path) -> None:
    counts = {name: metrics(runs / name)[0]["micro_batches"] for name in ("lora", "lora_two", "dora", "dora_two")}
    assert counts["lora"] == counts["lora_two"] == counts["dora"] == 1
    assert counts["dora_two"] > 1


@pytest.mark.parametrize("kind", list(RESUMED))
def test_resumed_on_two_ranks_is_bit_identical(runs: Path, kind: str) -> None:
    assert [row["step"] for row in metrics(runs / f"{kind}_resumed")] == [1, 2, 3, 4]
    assert without_time(metrics(runs / f"{kind}_resumed")) == without_time(metrics(runs / f"{kind}_two"))
    assert_same_state(runs / f"{kind}_resumed", runs / f"{kind}_two", 4)


def test_dropout_makes_another_run(runs: Path) -> None:
    assert metrics(runs / "dropout_two")[0]["loss"] == pytest.approx(metrics(runs / "lora")[0]["loss"], rel=1e-6)
    dropped, whole = (training_state(runs / name, 4) for name in ("dropout_two", "lora"))
    changed = [(dropped[name] - whole[name]).norm() / whole[name].norm() for name in whole if "lora_b.weight" in name]
    assert max(changed) > 1e-2


def test_the_averages_lag_behind_the_adapters(runs: Path) -> None:
    """So that equal averages are no copies of equal adapters."""
    state = training_state(runs / "lora_two", 4)
    for name in (name for name in state if name.startswith("target.") and name.endswith("lora_b.weight")):
        online = state[name.replace("target.", "trained.model.")]
        assert 0 < state[name].norm() < 0.1 * online.norm(), name
        assert not torch.equal(state[name], online)


def test_a_layer_that_two_ranks_cannot_share_is_refused(runs: Path) -> None:
    code, _, output = (runs / "refusal.txt").read_text().partition("\n")
    assert code.endswith("terminated with exit code 1")
    expected = "has 128 rows and 16384 weights, and 2 ranks can share a quantized weight only in equal parts of whole"
    assert output.count(f"error: backbone.layers.0.attn.q_proj.weight {expected}") == output.count("error: b") == 1
    assert not (runs / "refused").exists()


def test_quantized_dora_on_two_ranks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the config alone: no rank has to be there."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as exit_info:
        here(tmp_path / "run", *KINDS["quantized"], "model.use_dora=true")
    assert exit_info.value.code == 1
    message = capsys.readouterr().err
    assert message.count("error:") == 1
    assert "the config has a problem:" in message
    assert "model.use_dora: true with quantize_base: true on 2 processes, which FSDP2 cannot shard" in message
    assert not (tmp_path / "run").exists()
