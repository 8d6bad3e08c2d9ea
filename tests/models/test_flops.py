"""FLOPs of a step by sizes, against those that PyTorch counts while it runs on the meta device.

There attention is made of plain products, and its backward computes nothing twice: the counts are equal, not close.
"""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dllm_jepa.jepa import mlp_predictor, transformer_predictor
from dllm_jepa.models import MaskedDiffusionLM, step_flops
from dllm_jepa.models.dream import dream, dream_7b, lora_dream
from dllm_jepa.models.llada import llada, llada_8b, lora_llada

SIZES = {"vocab_size": 97, "embed_dim": 48, "num_layers": 2, "num_heads": 4, "mlp_dim": 80, "max_seq_len": 32}
GROUPED = SIZES | {"num_kv_heads": 2}
EVERYWHERE = {
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 5,
}
# PyTorch knows the product that makes a new tensor, not the one that is added to a tensor in place.
IN_PLACE = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}
LENGTHS = (5, 32)
SCORED = (1, 6)
COUNTS = {
    "tokens": sum(LENGTHS),
    "squared_lengths": sum(length**2 for length in LENGTHS),
    "scored": sum(SCORED),
    "sequences": len(LENGTHS),
}

MODELS: dict[str, Callable[[], MaskedDiffusionLM]] = {
    "llada": functools.partial(llada, **SIZES),
    "tied": functools.partial(llada, **SIZES, tie_embeddings=True),
    "grouped heads, biases": functools.partial(dream, **GROUPED),
    "lora": functools.partial(lora_llada, **SIZES, **EVERYWHERE),
    "lora, grouped heads, tied": functools.partial(lora_dream, **GROUPED, **EVERYWHERE, tie_embeddings=True),
    "lora, q and v": functools.partial(lora_llada, **SIZES, lora_attn_modules=["q_proj", "v_proj"]),
}


def on_meta(builder: Callable[[], MaskedDiffusionLM]) -> nn.ModuleDict:
    """What a step trains, without memory."""
    with torch.device("meta"):
        model = builder()
        return nn.ModuleDict({"model": model, "predictor": transformer_predictor(model.sizes.embed_dim, 112)})


def counted(trained: nn.ModuleDict, *, target: bool) -> int:
    """FLOPs that PyTorch counts in a step, one sequence after another; pooling is left out."""
    model = trained["model"]
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        for length, num_scored in zip(LENGTHS, SCORED, strict=True):
            row = torch.zeros(1, length, dtype=torch.int64, device="meta")
            scored = torch.zeros(num_scored, dtype=torch.int64, device="meta")
            if target:
                with torch.no_grad():
                    model(row)
            weights = torch.ones(num_scored, device="meta")
            hidden = model(row)
            loss, _ = model.score(hidden, scored, labels=scored, token_weights=weights, chunk_tokens=4)
            if target:
                loss = loss + trained["predictor"](hidden[:, 0]).sum()
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("name", "target"), [("llada", False), *((name, True) for name in MODELS)])
def test_pytorch_counts_the_same(name: str, target: bool) -> None:
    """The embedding's outputs are given a gradient: a frozen model has none before its first adapter."""
    trained = on_meta(MODELS[name])
    trained["model"].backbone.tok_embeddings.register_forward_hook(_with_gradient)
    assert step_flops(trained, **COUNTS, target=target) == counted(trained, target=target)


def test_what_a_frozen_model_does_not_compute() -> None:
    """Gradients of the first layer's inputs: through queries, keys and values, and the first halves of their adapters.

    With no adapter on the keys also that of the keys, one of the products of the first layer's attention.
    """
    width, trained = SIZES["embed_dim"], on_meta(MODELS["lora, q and v"])
    not_computed = 2 * COUNTS["tokens"] * width * (3 * width + 2 * 8) + 2 * width * COUNTS["squared_lengths"]
    assert step_flops(trained, **COUNTS, target=True) == counted(trained, target=True) + not_computed


def test_what_is_computed_twice_counts_once() -> None:
    trained = on_meta(MODELS["llada"])
    expected = step_flops(trained, **COUNTS, target=True)
    trained["model"].checkpoint_layers()
    assert step_flops(trained, **COUNTS, target=True) == expected
    assert counted(trained, target=True) > expected


def test_kinds_of_adapters_cost_the_same() -> None:
    """DoRA's norms and what it takes to unpack NF4 are no products of the method."""
    sizes = SIZES | {"embed_dim": 128, "mlp_dim": 256}  # NF4 has blocks
    costs = {
        step_flops(nn.ModuleDict({"model": lora_llada(**sizes, **EVERYWHERE, **kind)}), **COUNTS, target=True)
        for kind in ({}, {"use_dora": True}, {"quantize_base": True})
    }
    assert len(costs) == 1


def test_a_step_without_a_target_branch_runs_no_predictor() -> None:
    trained = on_meta(MODELS["llada"])
    alone = nn.ModuleDict({"model": trained["model"]})
    steps = [step_flops(modules, **COUNTS, target=False) for modules in (trained, alone)]
    assert steps[0] == steps[1]
    with_target = [step_flops(modules, **COUNTS, target=True) for modules in (trained, alone)]
    matrices = sum(param.numel() for param in trained["predictor"].parameters() if param.ndim == 2)
    assert with_target[0] - with_target[1] == 6 * len(LENGTHS) * matrices


def test_a_predictor_of_another_kind() -> None:
    trained = on_meta(MODELS["llada"])
    with torch.device("meta"):
        trained["predictor"] = mlp_predictor(SIZES["embed_dim"], 112)
    assert step_flops(trained, **COUNTS, target=True) == counted(trained, target=True)


@pytest.mark.parametrize(
    ("builder", "published"), [(llada_8b, 8_015_581_184), (dream_7b, 7_615_616_512)], ids=["llada_8b", "dream_7b"]
)
def test_the_published_sizes(builder: Callable[[], MaskedDiffusionLM], published: int) -> None:
    """Six FLOPs a parameter and token, the embedding aside, and attention."""
    trained = on_meta(builder)
    sizes = trained["model"].sizes
    embedding = sizes.vocab_size * sizes.embed_dim
    step = step_flops(trained, tokens=8192, squared_lengths=16 * 512**2, scored=8192, sequences=16, target=False)
    attention = 12 * sizes.num_layers * sizes.embed_dim * 16 * 512**2
    assert step == pytest.approx(6 * 8192 * (published - embedding) + attention, rel=1e-4)  # norms and biases are small


def _with_gradient(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    del module, inputs
    return output.requires_grad_()
