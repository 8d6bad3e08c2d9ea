"""A sharded model on two gloo ranks: its head gathered once a micro-batch, beside adapters and compiled layers, too."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import register_backend
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.tensor import DTensor
from torch.fx.experimental.symbolic_shapes import free_symbols

from dllm_jepa.models import LoRASettings, MaskedDiffusionLM, add_lora, init_rope
from dllm_jepa.models.dream import dream
from dllm_jepa.models.llada import llada
from dllm_jepa.training import Ranks, full_tensor, shard
from tests.launching import on_ranks

SIZES = {"vocab_size": 96, "embed_dim": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 48}
BUILDERS = {"llada": llada, "dream": dream}
LAYERS, LENGTH, CHUNK_TOKENS = ["layers.0", "layers.1", "layers.2"], 12, 4
KINDS = (
    "llada own kept float32",
    "llada own freed float32",
    "dream own kept float32",
    "llada tied kept float32",
    "llada own kept bfloat16",
)
MICRO_BATCHES = [[5, 9], [0, 6], [3, 0]]  # scored tokens on each of the two ranks
ADAPTERS = LoRASettings(["q_proj", "v_proj"], apply_to_mlp=True, rank=2, alpha=4.0)
COMPILED_LENGTHS = [5, 9, 12, 7, 3, 10]


def build(name: str, *, tied: bool, dtype: torch.dtype) -> MaskedDiffusionLM:
    torch.manual_seed(0)
    model: MaskedDiffusionLM = BUILDERS[name](**SIZES, max_seq_len=LENGTH, tie_embeddings=tied)
    model.to(dtype)
    init_rope(model)  # its tables stay in fp32
    return model


def with_adapters() -> MaskedDiffusionLM:
    """Frozen but for its adapters, which are not at their zeros of the start."""
    model = add_lora(build("llada", tied=False, dtype=torch.float32), ADAPTERS)
    for param in model.parameters():
        if param.requires_grad:
            nn.init.normal_(param, std=0.1)
    return model


def scored(number: int, rank: int) -> tuple[Tensor, dict[str, Any]]:
    """Tokens of a rank's micro-batch, and what the model is asked for."""
    generator = torch.Generator().manual_seed(10 * number + rank)
    n = MICRO_BATCHES[number][rank]
    tokens = torch.randint(0, 96, (2, LENGTH), generator=generator)
    return tokens, {
        "positions": torch.randperm(2 * LENGTH, generator=generator)[:n],
        "labels": torch.randint(0, 96, (n,), generator=generator),
        "token_weights": torch.rand(n, generator=generator),
        "chunk_tokens": CHUNK_TOKENS,
    }


def learn(model: nn.Module, number: int, rank: int) -> float:
    """Forward and backward of a micro-batch of a rank; returns its loss."""
    tokens, asked = scored(number, rank)
    hidden = model(tokens)
    losses = model.score(hidden, **asked)
    (losses.weighted_sum + 1e-3 * hidden.square().sum()).backward()
    loss: float = losses.weighted_sum.item()
    return loss


def train(model: nn.Module, ranks: list[int]) -> float:
    """Forward and backward of all micro-batches of some ranks; returns the sum of their losses."""
    return sum(learn(model, number, rank) for number in range(len(MICRO_BATCHES)) for rank in ranks)


def hidden_states(model: nn.Module, rank: int) -> list[list[float]]:
    """Of rows of many lengths, whose gradients are added."""
    values: list[list[float]] = []
    for length in COMPILED_LENGTHS:
        hidden = model(scored(0, rank)[0][:, :length])
        hidden.square().mean().backward()
        values.append(hidden.detach().flatten().tolist())
    return values


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients, of what has one."""
    return {key: full_tensor(param.grad) for key, param in model.named_parameters() if param.grad is not None}


# A rank


@contextlib.contextmanager
def gathers(model: MaskedDiffusionLM) -> Iterator[list[str]]:
    """Which units are gathered, and which layers are run in between, in order."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    seen: list[str] = []
    gather = _fsdp_param_group.foreach_all_gather

    def recorded(params: Any, *args: Any) -> Any:
        name = params[0]._param_fqn
        seen.append(next((layer for layer in LAYERS if layer in name), "head" if "head" in name else "root"))
        return gather(params, *args)

    with contextlib.ExitStack() as stack:
        for number, layer in enumerate(model.backbone.layers):
            hook = layer.attn.register_forward_pre_hook(lambda *_, number=number: seen.append(f"run layers.{number}"))
            stack.callback(hook.remove)
        stack.enter_context(patch.object(_fsdp_param_group, "foreach_all_gather", recorded))
        yield seen


def left_gathered(model: nn.Module) -> int:
    """Parameters of which this rank holds more than its part."""
    return sum(not isinstance(param, DTensor) for param in model.parameters())


def observe(name: str, ranks: Ranks, *, tied: bool, kept: bool, compute_dtype: torch.dtype) -> dict[str, Any]:
    """Everything that the tests look at, of one model."""
    model = build(name, tied=tied, dtype=torch.float32)
    shard(model, model.units, ranks, compute_dtype, kept=model.scorer if kept else None)
    with gathers(model) as of_loss:
        loss = train(model, [ranks.rank])
    gradients = {key: grad.tolist() for key, grad in gradients_of(model).items()}
    tokens, asked = scored(0, ranks.rank)
    with gathers(model) as of_hidden, torch.no_grad():
        model(tokens)
    with gathers(model) as of_evaluation, torch.no_grad():
        evaluated = [model.score(model(tokens), **asked).weighted_sum.item() for _ in range(2)]
    return {
        "loss": loss,
        "evaluated": evaluated,
        "gradients": gradients,
        "of_loss": of_loss,
        "of_hidden": of_hidden,
        "of_evaluation": of_evaluation,
        "left_gathered": left_gathered(model),
    }


def observe_adapters(ranks: Ranks) -> dict[str, Any]:
    """Of each micro-batch the branch of the target, without gradient and head, and then the one that learns."""
    model = with_adapters()
    shard(model, model.units, ranks, torch.float32, kept=model.head)
    parts: list[tuple[str, int, int]] = []
    loss = 0.0
    for number in range(len(MICRO_BATCHES)):
        for part in ("target", "online"):
            with gathers(model) as seen, torch.set_grad_enabled(part == "online"):
                if part == "target":
                    model(scored(number, ranks.rank)[0])
                else:
                    loss += learn(model, number, ranks.rank)
            parts.append((part, seen.count("head"), left_gathered(model)))
    return {
        "loss": loss,
        "parts": parts,
        "gradients": {key: grad.tolist() for key, grad in gradients_of(model).items()},
    }


def observe_compiled(ranks: Ranks) -> dict[str, Any]:
    """Compiled and then sharded layers: their numbers, their compilations, and of each trace the sizes left open."""
    left_open: list[list[str]] = []

    @register_backend
    def recorded(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        left_open.append(sorted(map(str, free_symbols(inputs))))
        return aot_eager(graph, inputs)

    model = build("llada", tied=False, dtype=torch.float32)
    for layer in model.backbone.layers:
        layer.compile(backend="recorded")
    shard(model, model.units[:-1], ranks, torch.float32)
    hidden = hidden_states(model, ranks.rank)
    gradients = {key: grad.tolist() for key, grad in gradients_of(model).items()}
    compilations = len({metrics.compile_id for metrics in torch._dynamo.utils.get_compilation_metrics()})
    return {"hidden": hidden, "gradients": gradients, "compilations": compilations, "left_open": left_open}


def observe_all(folder: Path) -> None:
    """Observe every kind on a rank, and write it down."""
    kinds: dict[str, Any] = {}
    with Ranks.join("cpu") as ranks:
        for kind in KINDS:
            name, head, after, dtype = kind.split()
            kinds[kind] = observe(
                name, ranks, tied=head == "tied", kept=after == "kept", compute_dtype=getattr(torch, dtype)
            )
        kinds["adapters"] = observe_adapters(ranks)
        kinds["compiled"] = observe_compiled(ranks)
        (folder / f"{ranks.rank}.json").write_text(json.dumps(kinds))


# The tests


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw."""
    directory = tmp_path_factory.mktemp("sharded")
    on_ranks(2, observe_all, directory)
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)]


def assert_gradients(model: nn.Module, actual: dict[str, Any]) -> None:
    expected = gradients_of(model)
    assert expected and actual.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(torch.tensor(actual[key]), grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llada own kept", "llada own freed", "dream own kept", "llada tied kept"])
def test_gradients_and_losses_are_those_of_one_process(observed: list[dict[str, Any]], kind: str) -> None:
    name, tied, _ = kind.split()
    model = build(name, tied=tied == "tied", dtype=torch.float32)
    loss = train(model, [0, 1])
    results = [rank[f"{kind} float32"] for rank in observed]
    assert sum(result["loss"] for result in results) == pytest.approx(loss, rel=1e-6)
    for result in results:
        assert_gradients(model, result["gradients"])


def test_the_head_is_gathered_once_a_micro_batch(observed: list[dict[str, Any]]) -> None:
    """Every other unit once in the forward and once in the backward."""
    for rank in observed:
        for kind, repeated in (("own kept", 1), ("own freed", 2)):
            seen = rank[f"llada {kind} float32"]["of_loss"]
            assert seen.count("head") == repeated * len(MICRO_BATCHES)
            assert [seen.count(layer) for layer in LAYERS] == [2 * len(MICRO_BATCHES)] * 3


def test_each_unit_is_gathered_while_the_one_before_it_has_yet_to_run(observed: list[dict[str, Any]]) -> None:
    forward = ["root", "layers.0", "layers.1", "run layers.0", "layers.2", "run layers.1", "head", "run layers.2"]
    for rank in observed:
        seen = rank["llada own kept float32"]["of_loss"]
        assert seen[:8] == forward
        assert sorted(seen[8:12]) == [*LAYERS, "root"]  # the backward


def test_without_gradient_the_head_is_gathered_only_for_its_logits_and_given_up(observed: list[dict[str, Any]]) -> None:
    for rank in observed:
        for kind in ("llada own kept float32", "dream own kept float32", "llada own kept bfloat16"):
            assert "head" not in rank[kind]["of_hidden"]
            assert rank[kind]["of_evaluation"].count("head") == 2
            assert rank[kind]["left_gathered"] == 0


def test_weights_of_tokens_are_not_rounded_to_the_compute_type(observed: list[dict[str, Any]]) -> None:
    """Of bf16 weights the losses are off by bf16's rounding, but the weighted sum of the losses not by another one."""
    for number, rank in enumerate(observed):
        result = rank["llada own kept bfloat16"]
        model = build("llada", tied=False, dtype=torch.bfloat16)
        tokens, asked = scored(0, number)
        with torch.no_grad():
            weighted_sum = model.score(model(tokens), **asked).weighted_sum.item()
        assert result["evaluated"] == pytest.approx([weighted_sum] * 2, rel=1e-6)


def test_beside_adapters_the_frozen_head_is_gathered_once_a_micro_batch(observed: list[dict[str, Any]]) -> None:
    """Not for the target, which takes turns with the model that learns; and nothing stays gathered after either."""
    model = with_adapters()
    loss = train(model, [0, 1])
    results = [rank["adapters"] for rank in observed]
    assert sum(result["loss"] for result in results) == pytest.approx(loss, rel=1e-6)
    for result in results:
        assert result["parts"] == [["target", 0, 0], ["online", 1, 0]] * len(MICRO_BATCHES)
        assert all("lora" in key for key in result["gradients"])
        assert_gradients(model, result["gradients"])


def test_compiled_layers_can_be_sharded(observed: list[dict[str, Any]]) -> None:
    """The numbers of one process without compilation; all layers are traced once, for any rows and tokens."""
    model = build("llada", tied=False, dtype=torch.float32)
    expected = [hidden_states(model, rank) for rank in range(2)]
    for rank, hidden in zip(observed, expected, strict=True):
        result = rank["compiled"]
        for actual, reference in zip(result["hidden"], hidden, strict=True):
            torch.testing.assert_close(torch.tensor(actual), torch.tensor(reference), rtol=1e-4, atol=1e-5)
        assert_gradients(model, result["gradients"])
        (left_open,) = result["left_open"]
        assert result["compilations"] == 1 and len(left_open) == 2
