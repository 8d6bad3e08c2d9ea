"""Layers against those of torchtune, bit for bit, and what importing them costs."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import FeedForward as ReferenceFeedForward
from torchtune.modules.low_precision import FrozenNF4Linear
from torchtune.modules.peft import LoRALinear as ReferenceLoRALinear

from dllm_jepa.models import LoRASettings
from dllm_jepa.models._layers import FeedForward, RotaryEmbedding
from dllm_jepa.models._lora import LoRALinear, _quantize


def test_the_rotary_table_is_that_of_torchtune() -> None:
    ours, theirs = RotaryEmbedding(16, 300, 5e5), Qwen2RotaryPositionalEmbeddings(16, 300, 5e5)
    cos, _, sin, _ = theirs.cache.chunk(4, dim=-1)
    assert torch.equal(ours.cache, torch.cat((cos, sin), dim=-1))
    ours.to(torch.bfloat16).reset()
    assert ours.cache.dtype == torch.float32 and torch.equal(ours.cache[:, :8], cos)


def test_the_feed_forward_is_that_of_torchtune() -> None:
    ours = FeedForward(32, 48)
    theirs = ReferenceFeedForward(gate_proj=ours.w1, down_proj=ours.w2, up_proj=ours.w3)
    assert [*theirs.state_dict()] == [*ours.state_dict()]
    x = torch.randn(5, 32)
    assert torch.equal(ours(x), theirs(x))


def output_and_gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """In training, with the same draw of dropout every time; what has no gradient is left out."""
    torch.manual_seed(7)
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        out = module(leaf)
    out.float().square().sum().backward()
    return {"out": out, "x": leaf.grad} | {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantize_base", [False, True])
def test_lora_is_that_of_torchtune(quantize_base: bool, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 128, bias=bias).requires_grad_(False).to(dtype)
    if quantize_base:
        _quantize(linear)
    ours = LoRALinear(linear, LoRASettings(["q_proj"], False, rank=4, alpha=6.0, dropout=0.3))
    nn.init.normal_(ours.lora_b.weight)
    options: Any = {"rank": 4, "alpha": 6.0, "dropout": 0.3, "use_bias": bias, "quantize_base": quantize_base}
    theirs = ReferenceLoRALinear(256, 128, **options)
    assert [name for name, _ in theirs.named_parameters()] == [name for name, _ in ours.named_parameters()]
    theirs.weight, theirs.bias = ours.weight, ours.bias
    theirs.lora_a, theirs.lora_b = ours.lora_a, ours.lora_b
    x = torch.randn(5, 256, dtype=dtype)
    expected = output_and_gradients(theirs, x)
    ours.zero_grad()
    found = output_and_gradients(ours, x)
    assert found.keys() == expected.keys() == {"out", "x", "lora_a.weight", "lora_b.weight"}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("bias", [False, True])
def test_a_quantized_layer_without_adapter_is_that_of_torchtune(bias: bool) -> None:
    linear = nn.Linear(256, 128, bias=bias).requires_grad_(False)
    _quantize(linear)
    theirs = FrozenNF4Linear(256, 128, bias=bias)
    theirs.weight, theirs.bias = linear.weight, linear.bias
    x = torch.randn(5, 256)
    found, expected = output_and_gradients(linear, x), output_and_gradients(theirs, x)
    assert torch.equal(found["out"], expected["out"]) and torch.equal(found["x"], expected["x"])


def test_importing_models_imports_neither_torchtune_nor_torchao_nor_the_compiler() -> None:
    """Each takes longer than torch itself."""
    heavy = ("torchtune", "torchao", "torch._dynamo")
    code = f"import sys, dllm_jepa.models; print([name for name in {heavy} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
