"""The head on two gloo ranks: gathered once a micro-batch, and the gradients of one process."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dllm_jepa.models import MaskedDiffusionLM, init_rope
from dllm_jepa.models.dream import dream
from dllm_jepa.models.llada import llada
from dllm_jepa.training import Ranks, full_tensor, shard
from tests.launching import launch

SIZES = {"vocab_size": 96, "embed_dim": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 48}
BUILDERS = {"llada": llada, "dream": dream}
LAYERS, LENGTH, CHUNK_TOKENS = ["layers.0", "layers.1", "layers.2"], 12, 4
KINDS = (
    "llada own kept float32",
    "llada own freed float32",
    "dream own kept float32",
    "llada tied freed float32",
    "llada own kept bfloat16",
)
MICRO_BATCHES = [[5, 9], [0, 6], [3, 0]]  # scored tokens on each of the two ranks


def build(name: str, *, tied: bool, dtype: torch.dtype) -> MaskedDiffusionLM:
    torch.manual_seed(0)
    model: MaskedDiffusionLM = BUILDERS[name](**SIZES, max_seq_len=LENGTH, tie_embeddings=tied)
    model.to(dtype)
    init_rope(model)  # its tables stay in fp32
    return model


def scored(number: int, rank: int) -> tuple[Tensor, dict[str, Any]]:
    """Tokens of a rank's micro-batch, and what the model is asked for."""
    generator = torch.Generator().manual_seed(10 * number + rank)
    n = MICRO_BATCHES[number][rank]
    tokens = torch.randint(0, 96, (2, LENGTH), generator=generator)
    return tokens, {
        "logits_at": torch.randperm(2 * LENGTH, generator=generator)[:n],
        "labels": torch.randint(0, 96, (n,), generator=generator),
        "token_weights": torch.rand(n, generator=generator),
        "chunk_tokens": CHUNK_TOKENS,
    }


def train(model: nn.Module, ranks: list[int]) -> float:
    """Forward and backward of all micro-batches of some ranks; returns the sum of their losses."""
    total = 0.0
    for number in range(len(MICRO_BATCHES)):
        for rank in ranks:
            tokens, asked = scored(number, rank)
            hidden, losses = model(tokens, **asked)
            (losses.weighted_sum + 1e-3 * hidden.square().sum()).backward()
            total += losses.weighted_sum.item()
    return total


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


def observe(name: str, ranks: Ranks, *, tied: bool, kept: bool, compute_dtype: torch.dtype) -> dict[str, Any]:
    """Everything that the tests look at, of one model."""
    model = build(name, tied=tied, dtype=torch.float32)
    shard(model, model.units, ranks, compute_dtype, kept=model.head if kept else None)
    with gathers(model) as of_loss:
        loss = train(model, [ranks.rank])
    gradients = {key: full_tensor(param.grad).tolist() for key, param in model.named_parameters()}
    tokens, asked = scored(0, ranks.rank)
    with gathers(model) as of_hidden, torch.no_grad():
        model(tokens)
    with gathers(model) as of_evaluation, torch.no_grad():
        evaluated = [model(tokens, **asked)[1].weighted_sum.item() for _ in range(2)]
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    params = [param for unit in units for param in unit.parameters(recurse=False)]
    return {
        "loss": loss,
        "evaluated": evaluated,
        "gradients": gradients,
        "of_loss": of_loss,
        "of_hidden": of_hidden,
        "of_evaluation": of_evaluation,
        "left_gathered": sum(not isinstance(param, DTensor) for param in params),
    }


def main() -> None:
    """Observe every kind on a rank, and write it down."""
    kinds: dict[str, Any] = {}
    with Ranks.join("cpu") as ranks:
        for kind in KINDS:
            name, head, after, dtype = kind.split()
            kinds[kind] = observe(
                name, ranks, tied=head == "tied", kept=after == "kept", compute_dtype=getattr(torch, dtype)
            )
        Path(sys.argv[1], f"{ranks.rank}.json").write_text(json.dumps(kinds))


# The tests


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw."""
    directory = tmp_path_factory.mktemp("head")
    launch(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__], str(directory))
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", ["llada own kept", "llada own freed", "dream own kept", "llada tied freed"])
def test_gradients_and_losses_are_those_of_one_process(observed: list[dict[str, Any]], kind: str) -> None:
    name, tied, _ = kind.split()
    model = build(name, tied=tied == "tied", dtype=torch.float32)
    loss = train(model, [0, 1])
    results = [rank[f"{kind} float32"] for rank in observed]
    assert sum(result["loss"] for result in results) == pytest.approx(loss, rel=1e-6)
    for result in results:
        for key, param in model.named_parameters():
            torch.testing.assert_close(torch.tensor(result["gradients"][key]), param.grad, rtol=1e-4, atol=1e-6)


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
            weighted_sum = model(tokens, **asked)[1].weighted_sum.item()
        assert result["evaluated"] == pytest.approx([weighted_sum] * 2, rel=1e-6)


if __name__ == "__main__":
    main()
