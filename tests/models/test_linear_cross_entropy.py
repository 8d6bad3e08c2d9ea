"""Head and cross-entropy in chunks, against the whole logits in fp64."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dllm_jepa.memory import LiveStorages
from dllm_jepa.models import linear_cross_entropy
from dllm_jepa.models._linear_cross_entropy import ChunkLoss, chunk_loss, compiled_chunk_loss
from dllm_jepa.models.llada import llada

N, D, V = 13, 8, 37
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(n: int = N, *, dtype: torch.dtype = torch.float32) -> Inputs:
    """Hidden states [n, D] and a weight [V, D] that need gradients, labels, and weights of very different sizes."""
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (n,), generator=generator)
    token_weights = torch.tensor([0.0, 1e-4, 0.3, 50.0]).repeat(-(-n // 4))[:n]
    return hidden, weight, labels, token_weights


def in_fp64(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> dict[str, Tensor]:
    """Everything from the whole logits."""
    hidden, weight = (leaf.detach().double().requires_grad_() for leaf in (hidden, weight))
    per_token = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    weighted_sum = (token_weights.double() * per_token).sum()
    weighted_sum.backward()
    assert hidden.grad is not None and weight.grad is not None
    return {"sum": weighted_sum, "per_token": per_token, "hidden": hidden.grad, "weight": weight.grad}


def in_chunks(values: Inputs, chunk_tokens: int, chunk_loss: ChunkLoss = chunk_loss) -> dict[str, Tensor]:
    hidden, weight, *_ = values
    losses = linear_cross_entropy(*values, chunk_tokens=chunk_tokens, chunk_loss=chunk_loss)
    losses.weighted_sum.backward()
    assert hidden.grad is not None and weight.grad is not None
    return {"sum": losses.weighted_sum, "per_token": losses.per_token, "hidden": hidden.grad, "weight": weight.grad}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rel: float) -> None:
    """In the norm of the difference, next to that of the whole tensor."""
    for name, tensor in expected.items():
        assert torch.isfinite(actual[name]).all(), name
        difference = (actual[name].double() - tensor).norm()
        assert difference <= rel * tensor.norm(), f"{name}: {difference / tensor.norm()}"


# Values


@pytest.mark.parametrize("chunk_tokens", [1, 4, 5, 100])
def test_any_chunk_gives_losses_and_gradients_of_the_whole(chunk_tokens: int) -> None:
    values = inputs(12) if chunk_tokens == 4 else inputs()
    assert_same(in_chunks(values, chunk_tokens), in_fp64(*values), 1e-6)


def test_in_fp64_it_is_exact_to_fp64() -> None:
    hidden, weight, labels, token_weights = inputs(dtype=torch.float64)
    values = (hidden, weight, labels, token_weights.double())
    assert_same(in_chunks(values, 5), in_fp64(*values), 1e-14)


def test_the_gradient_is_scaled_by_what_comes_back_once() -> None:
    values = inputs()
    losses = linear_cross_entropy(*values, chunk_tokens=5)
    assert losses.weighted_sum.requires_grad and not losses.per_token.requires_grad
    assert losses.weighted_sum.dtype == losses.per_token.dtype == torch.float32
    (losses.weighted_sum.square() / 7).backward(retain_graph=True)
    expected = in_fp64(*values)
    factor = 2 * expected["sum"].detach() / 7
    assert values[0].grad is not None and values[1].grad is not None
    wanted = {name: factor * expected[name] for name in ("hidden", "weight")}
    assert_same({"hidden": values[0].grad, "weight": values[1].grad}, wanted, 1e-6)
    with pytest.raises(RuntimeError, match="a second backward pass through the same losses"):
        losses.weighted_sum.backward()


def test_a_token_of_weight_zero_changes_nothing_but_its_own_loss() -> None:
    hidden, weight, labels, _ = inputs()
    token_weights = torch.zeros(N)
    result = in_chunks((hidden, weight, labels, token_weights), 5)
    assert result["sum"] == 0 and not result["hidden"].any() and not result["weight"].any()
    assert (result["per_token"] > 0).all()


def test_without_tokens_gradients_are_zeros() -> None:
    result = in_chunks(inputs(0), 5)
    assert result["sum"] == 0 and result["per_token"].shape == (0,)
    assert result["hidden"].shape == (0, D)
    assert torch.equal(result["weight"], torch.zeros(V, D))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_no_memory_for_one(frozen: str) -> None:
    values = inputs()
    leaves = dict(zip(("hidden", "weight"), values[:2], strict=True))
    leaves[frozen].requires_grad_(False)
    with Recorded() as recorded:
        linear_cross_entropy(*values, chunk_tokens=5).weighted_sum.backward()
    expected = in_fp64(*values)
    assert leaves.pop(frozen).grad is None
    ((name, leaf),) = leaves.items()
    assert leaf.grad is not None
    assert_same({name: leaf.grad}, {name: expected[name]}, 1e-6)
    made = {shape for shape, _ in recorded.made}
    assert ((V, D) in made) == (frozen != "weight") and ((N, D) in made) == (frozen != "hidden")


@pytest.mark.parametrize("frozen", [False, True])
def test_without_gradient_there_are_only_losses(frozen: bool) -> None:
    values = inputs()
    for leaf in values[:2]:
        leaf.requires_grad_(not frozen)
    with torch.set_grad_enabled(frozen), Recorded() as recorded:
        losses = linear_cross_entropy(*values, chunk_tokens=5)
    expected = in_fp64(*values)
    assert not losses.weighted_sum.requires_grad
    del expected["hidden"], expected["weight"]
    assert_same({"sum": losses.weighted_sum, "per_token": losses.per_token}, expected, 1e-6)
    assert not {(V, D), (N, D)} & {shape for shape, _ in recorded.made}


def test_what_cannot_be_computed_is_refused() -> None:
    hidden, *others = inputs()
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1, got 0"):
        linear_cross_entropy(hidden, *others, chunk_tokens=0)
    with pytest.raises(ValueError, match=r"hidden states in torch.bfloat16 and a head in torch.float32"):
        linear_cross_entropy(hidden.bfloat16(), *others, chunk_tokens=5)


# Numbers at the border of what there is


def test_huge_logits_are_finite_and_right() -> None:
    """Right and wrong by 10,000: a loss of zero, one of 20,000, and gradients of zero and one."""
    hidden = torch.tensor([[1e4], [1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    result = in_chunks((hidden, weight, torch.tensor([0, 2]), torch.ones(2)), 1)
    assert result["per_token"].tolist() == [0.0, 2e4]
    assert result["hidden"].tolist() == [[0.0], [2.0]]
    assert result["weight"].tolist() == [[1e4], [0.0], [-1e4]]


# bf16


def wide(n: int, hidden_dtype: torch.dtype, weight_dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 64, generator=generator).to(hidden_dtype).requires_grad_()
    weight = (0.3 * torch.randn(500, 64, generator=generator)).to(weight_dtype).requires_grad_()
    labels = torch.randint(0, 500, (n,), generator=generator)
    return hidden, weight, labels, torch.rand(n, generator=generator) / n


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_it_is_as_good_as_whole_logits(hidden_dtype: torch.dtype) -> None:
    """Within 1 % of fp64 (bf16 rounds by up to 0.4 %), and no worse than the usual call by more than a tenth."""
    values = wide(96, hidden_dtype, torch.float32)
    hidden, weight, labels, token_weights = values
    expected = in_fp64(*values)
    with torch.autocast("cpu", torch.bfloat16):
        usual_loss = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")
    (token_weights * usual_loss).sum().backward()
    usual = {"hidden": hidden.grad, "weight": weight.grad, "per_token": usual_loss}
    hidden.grad = weight.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        losses = linear_cross_entropy(*values, chunk_tokens=20)
        assert torch.is_autocast_enabled("cpu")
    losses.weighted_sum.backward()
    chunked = {"hidden": hidden.grad, "weight": weight.grad, "per_token": losses.per_token}
    assert hidden.grad is not None and hidden.grad.dtype == hidden_dtype
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert losses.per_token.dtype == torch.float32
    for name in ("hidden", "weight", "per_token"):
        ours, theirs = (
            ((result[name].double() - expected[name]).norm() / expected[name].norm()).item()  # type: ignore[union-attr]
            for result in (chunked, usual)
        )
        assert ours < 0.01 and ours < 1.1 * theirs, name


def test_under_autocast_the_weight_is_cast_once_and_autocast_is_off_for_the_loss() -> None:
    def watched(*chunk: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return chunk_loss(*chunk)

    seen: list[bool] = []
    with torch.autocast("cpu", torch.bfloat16), Recorded() as recorded:
        linear_cross_entropy(*inputs(), chunk_tokens=5, chunk_loss=watched)
    assert seen == [False] * 3
    assert recorded.made.count(((V, D), "aten._to_copy.default")) == 1


def test_in_bf16_gradients_are_those_of_fp64_within_its_rounding() -> None:
    values = wide(96, torch.bfloat16, torch.bfloat16)
    result = in_chunks(values, 20)
    assert result["weight"].dtype == result["hidden"].dtype == torch.bfloat16
    assert_same(result, in_fp64(*values), 0.01)


# Compiled


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ChunkLoss]]:
    def build(backend: str) -> ChunkLoss:
        monkeypatch.setenv("TORCH_COMPILE_BACKEND", backend)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        return compiled_chunk_loss()

    yield build
    torch._dynamo.reset()


def test_compiled_is_eager_and_makes_no_graph_for_every_number_of_tokens(
    compiled: Callable[[str], ChunkLoss],
) -> None:
    loss = compiled("aot_eager")
    # Chunks of 5, 2, 3 and 4, and then also of 1: torch compiles anew for a dimension of 1, once.
    for lengths, graphs in (((13, 5, 12, 9, 27, 14, 0, 30), 1), ((31, 6, 16), 2)):
        for n in lengths:
            values = inputs(n)
            assert_same(in_chunks(values, 5, loss), in_fp64(*values), 1e-6)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
def test_compiled_to_machine_code_it_is_eager(compiled: Callable[[str], ChunkLoss]) -> None:
    loss = compiled("inductor")
    values = inputs()
    assert_same(in_chunks(values, 5, loss), in_fp64(*values), 1e-6)


# Memory, and waiting for the device


class Recorded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shapes of all that operators make, and which operator made them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[tuple[tuple[int, ...], str]] = []
        self.called: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.called.add(str(func))
        out = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self.made.append((tuple(leaf.shape), str(func)))
        return out


hows = pytest.mark.parametrize("how", ["fp32", "autocast", "no_grad"])


def scored(values: Inputs, how: str) -> None:
    """Losses in chunks of 7 tokens and, but for `no_grad`, their backward pass."""
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"), torch.set_grad_enabled(how != "no_grad"):
        losses = linear_cross_entropy(*values, chunk_tokens=7)
        if how != "no_grad":
            (3 * losses.weighted_sum).backward()


@hows
def test_no_more_than_a_chunk_of_logits_is_ever_made_and_nothing_waits_for_the_device(how: str) -> None:
    with Recorded() as recorded:
        scored(inputs(100), how)
    assert max(shape[0] for shape, _ in recorded.made if V in shape and D not in shape and len(shape) > 1) == 7
    waits = ("_local_scalar_dense", "nonzero", "masked_select")  # what `item`, `nonzero` and masks call
    assert [name for name in recorded.called if any(wait in name for wait in waits)] == []


def test_nor_by_a_model() -> None:
    model = llada(vocab_size=V, embed_dim=D, num_layers=1, num_heads=2, mlp_dim=12, max_seq_len=50)
    labels, weights = torch.zeros(100, dtype=torch.int64), torch.ones(100)
    with Recorded() as recorded:
        hidden = model(torch.zeros(2, 50, dtype=torch.int64))
        losses = model.score(hidden, torch.arange(100), labels=labels, token_weights=weights, chunk_tokens=7)
        losses.weighted_sum.backward()
    assert max(shape[0] for shape, _ in recorded.made if len(shape) > 1 and V in shape and D not in shape) == 7


@hows
def test_the_peak_does_not_grow_with_the_tokens(how: str) -> None:
    """But by the gradient of the hidden states and the losses: D and two numbers a token."""

    def peak(n: int) -> int:
        values = inputs(n)
        with LiveStorages() as storages:
            scored(values, how)
        return storages.peak

    assert 0 <= peak(700) - peak(70) <= 630 * 4 * (2 + (D if how != "no_grad" else 0))
    assert 2 * 7 * V * 4 <= peak(70) + 4 * V * D  # it does see the logits


def test_a_chunk_in_fp32_takes_no_second_one() -> None:
    logits = torch.randn(50, 1000)
    with LiveStorages() as storages:
        chunk_loss(logits, torch.zeros(50, dtype=torch.int64), torch.ones(50))
    assert storages.peak < 0.02 * 4 * logits.numel()


def test_a_chunk_is_gone_before_the_next_one() -> None:
    hidden, weight = torch.randn(150, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    with LiveStorages() as storages:
        linear_cross_entropy(hidden, weight, torch.zeros(150, dtype=torch.int64), torch.ones(150), chunk_tokens=50)
    assert storages.peak < 1.2 * 4 * 50 * 1000


def test_leaves_take_the_gradients_over_without_a_copy() -> None:
    values = inputs()
    losses = linear_cross_entropy(*values, chunk_tokens=5)
    with LiveStorages() as storages:
        losses.weighted_sum.backward()
    assert storages.peak == 4  # the one at the start of the backward pass
