"""Losses over the whole batch, in the copied recipe of docs/recipes.md: any ranks, packed or padded, the same run."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dllm_jepa.training import Ranks
from tests.launching import metrics, on_ranks, run_here, run_on_ranks, training_state
from tests.test_docs import RECIPE, apply_diff, fences, sections

LOSSES = ("vicreg", "info_nce")
SPLITS = {"packed": ("tokens_per_device=4000",), "padded": ("tokens_per_device=4000", "packed=false")}
SAVED = ("checkpoint.every_n_steps=6", "max_steps=6")


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example's copies of the recipe, one for each loss."""
    folder = tmp_path_factory.mktemp("copies")
    (example,) = (text for text in sections("recipes.md").values() if "BATCH_LOSS" in text)
    (losses,) = fences(example, "python")
    (folder / "my_losses.py").write_text(losses)
    recipe = apply_diff(RECIPE.read_text(), "".join(fences(example, "diff")))
    for loss in LOSSES:
        (folder / f"my_{loss}.py").write_text(recipe.replace("BATCH_LOSS = vicreg", f"BATCH_LOSS = {loss}"))
    return folder


@pytest.fixture(scope="module")
def runs(copies: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(copies)
        for loss in LOSSES:
            of_split = {copies / f"{loss}_two_{name}": [*split, *SAVED] for name, split in SPLITS.items()}
            run_on_ranks(2, of_split, recipe=f"my_{loss}")
            for name, split in SPLITS.items():
                run_here(copies / f"{loss}_{name}", *split, *SAVED, recipe=f"my_{loss}")
    for name in {"my_losses", *(f"my_{loss}" for loss in LOSSES)}:
        sys.modules.pop(name, None)
    return copies


@pytest.mark.parametrize("variant", ["padded", "two_packed", "two_padded"])
@pytest.mark.parametrize("loss", LOSSES)
def test_any_ranks_and_layout_are_the_same_run(runs: Path, loss: str, variant: str) -> None:
    """Losses, gradient norms and the metric of one's own at every step, and the weights at the end."""
    rows, expected_rows = metrics(runs / f"{loss}_{variant}"), metrics(runs / f"{loss}_packed")
    assert len(rows) == len(expected_rows) == 6
    for row, expected in zip(rows, expected_rows, strict=True):
        for key in ("loss", "diffusion_loss", "jepa_loss", "grad_norm", "pred_norm"):
            assert row[key] == pytest.approx(expected[key], rel=1e-5), (row["step"], key)
    state, expected_state = (training_state(runs / f"{loss}{name}", 6) for name in (f"_{variant}", "_packed"))
    for name in (name for name in state if not name.startswith("optimizer")):
        difference = (state[name] - expected_state[name]).norm() / expected_state[name].norm()
        assert difference <= 1e-5, f"{name}: {difference}"


def test_the_losses_are_two_and_move_the_predictor(runs: Path) -> None:
    """Otherwise equal runs would say nothing."""
    first, second = (training_state(runs / f"{loss}_packed", 6) for loss in LOSSES)
    moved = [(first[n] - second[n]).norm() / first[n].norm() for n in first if n.startswith("trained.predictor")]
    assert max(moved) > 1e-3


def test_a_step_of_several_micro_batches_is_refused(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(runs)
    with pytest.raises(SystemExit):
        run_here(tmp_path / "run", "tokens_per_device=130", recipe="my_vicreg")
    message = capsys.readouterr().err
    assert message.count("error:") == 1 and "tokens_per_device=130" in message and "a loss over the batch" in message
    assert not (tmp_path / "run").exists()


# Against plain formulas in double precision


def vicreg_by_hand(pred: Tensor, target: Tensor) -> float:
    rows, others = pred.double().tolist(), target.double().tolist()
    count, width = len(rows), len(rows[0])
    mean = [sum(row[d] for row in rows) / count for d in range(width)]

    def covariance(a: int, b: int) -> float:
        return sum((row[a] - mean[a]) * (row[b] - mean[b]) for row in rows) / (count - 1)

    distance = sum(
        (x - y) ** 2 for row, other in zip(rows, others, strict=True) for x, y in zip(row, other, strict=True)
    )
    spread = sum(max(0.0, 1 - math.sqrt(covariance(d, d) + 1e-4)) for d in range(width)) / width
    between = sum(covariance(a, b) ** 2 for a in range(width) for b in range(width) if a != b) / width
    return 25 * distance / (count * width) + 25 * spread + between


def info_nce_by_hand(pred: Tensor, target: Tensor) -> float:
    rows, others = pred.double().tolist(), target.double().tolist()
    total = 0.0
    for i, row in enumerate(rows):
        scores = [
            sum(x * y for x, y in zip(row, other, strict=True)) / math.hypot(*row) / math.hypot(*other) / 0.1
            for other in others
        ]
        total += math.log(sum(map(math.exp, scores))) - scores[i]
    return total / len(rows)


def rows_of_a_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(7, 5, generator=generator), torch.randn(7, 5, generator=generator)


def gather_and_learn(folder: Path, losses: Path) -> None:
    """A rank, with rows of its own: every loss, its gradient with respect to them, and the sum over ranks."""
    sys.path.insert(0, str(losses))
    import my_losses

    with Ranks.join("cpu") as ranks:
        positions = torch.tensor([[6, 0, 3], [1, 5, 2, 4]][ranks.rank])
        own, target = (rows[positions].requires_grad_() for rows in rows_of_a_batch())
        found = {}
        for name in LOSSES:
            rows = [ranks.gather_rows(part, positions, 7) for part in (own, target.detach())]
            part = ranks.count_once(getattr(my_losses, name)(*rows))
            (gradient,) = torch.autograd.grad(part, own)
            found[name] = (ranks.sum(part.detach().clone()), gradient)
        torch.save((positions, found), folder / f"{ranks.rank}.pt")


def test_the_losses_are_computed_in_fp32_under_autocast_too(copies: Path) -> None:
    """Steps 3 and 4 stand under one autocast, which is on in one process alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(copies)
        import my_losses
    sys.modules.pop("my_losses")
    for name in LOSSES:
        loss = getattr(my_losses, name)
        with torch.autocast("cpu", torch.bfloat16):
            inside = loss(*rows_of_a_batch())
        assert torch.equal(inside, loss(*rows_of_a_batch()))


def test_value_and_gradient_of_two_ranks_are_those_of_the_whole_batch(copies: Path, tmp_path: Path) -> None:
    on_ranks(2, gather_and_learn, tmp_path, copies)
    pred, target = rows_of_a_batch()
    pred.requires_grad_()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(copies)
        import my_losses
    sys.modules.pop("my_losses")
    for name, by_hand in (("vicreg", vicreg_by_hand), ("info_nce", info_nce_by_hand)):
        (whole,) = torch.autograd.grad(getattr(my_losses, name)(pred, target), pred)
        for positions, of_rank in found:
            value, gradient = of_rank[name]
            assert float(value) == pytest.approx(by_hand(pred, target), rel=1e-5)
            torch.testing.assert_close(gradient, whole[positions], rtol=1e-5, atol=1e-6)
