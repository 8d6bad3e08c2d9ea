"""Kernels for packed rows against a dense masked product in fp64, and the choice of one."""

import pytest
import torch
from torch import Tensor

from dllm_jepa.models import choose_packed_attention
from dllm_jepa.models._attention import PackedAttention, bucketed_attention, fastest_kernel, packed_kernel
from dllm_jepa.models._layers import BidirectionalAttention
from dllm_jepa.models.llada import llada
from dllm_jepa.packing import PackedSequences

LENGTHS = {
    "one token": [1],
    "one": [37],
    "even": [9, 9, 9, 9],
    "same bucket": [5, 8, 6, 7],
    "mixed": [7, 1, 130, 3, 8, 300, 2],
    "many": [1 + 7 * number % 40 for number in range(60)],
}
heads = pytest.mark.parametrize("num_kv_heads", [4, 2], ids=["heads", "grouped"])


def dense(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Every score of the row in fp64, those between sequences set to minus infinity."""
    owner = torch.tensor([number for number, length in enumerate(lengths) for _ in range(length)], device=q.device)
    k, v = (heads.double().repeat_interleave(q.size(1) // heads.size(1), dim=1) for heads in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) / q.size(-1) ** 0.5
    scores = scores.masked_fill(owner[:, None] != owner[None], -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def row(lengths: list[int], num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Random queries, keys, values and a gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(sum(lengths), count, head_dim, generator=generator, dtype=torch.float64).to(device, dtype)
        for count in (4, num_kv_heads, num_kv_heads, 4)
    ]


def with_gradients(kernel: PackedAttention, tensors: list[Tensor], lengths: list[int]) -> list[Tensor]:
    """The result and the gradients of queries, keys and values."""
    q, k, v = (tensor.detach().clone().requires_grad_() for tensor in tensors[:3])
    packing = PackedSequences.from_lengths(lengths).to(q.device)
    out = dense(q, k, v, lengths) if kernel is dense else kernel(q, k, v, packing)
    assert out.shape == q.shape
    return [out, *torch.autograd.grad(out, (q, k, v), tensors[3].to(out.dtype))]


@heads
def test_the_reference(num_kv_heads: int) -> None:
    """Values and gradients."""
    for name, lengths in LENGTHS.items():
        tensors = row(lengths, num_kv_heads, 16, torch.float64, "cpu")
        ours, expected = (with_gradients(kernel, tensors, lengths) for kernel in (bucketed_attention, dense))
        torch.testing.assert_close(ours, expected, msg=name)


@heads
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex(num_kv_heads: int) -> None:
    """Its mask and its call; it has no backward pass on CPU."""
    for name, lengths in LENGTHS.items():
        q, k, v, _ = row(lengths, num_kv_heads, 16, torch.float64, "cpu")
        with torch.compiler.set_stance("force_eager"):
            ours = packed_kernel("flex")(q, k, v, PackedSequences.from_lengths(lengths))
        torch.testing.assert_close(ours, dense(q, k, v, lengths), msg=name)


@pytest.mark.gpu
@heads
@pytest.mark.parametrize(("name", "head_dim"), [("varlen", 64), ("varlen", 128), ("varlen", 192), ("flex", 64),
                                                ("flex", 256), ("flex", 20), ("sdpa", 64)])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_kernels_of_gpus(name: str, head_dim: int, dtype: torch.dtype, num_kv_heads: int) -> None:
    """Values and gradients, each within a few rounding errors of the largest; one kernel serves rows of all sizes."""
    torch._dynamo.reset()  # lest the limit of recompilations be reached, and flex attention run uncompiled
    for lengths in LENGTHS.values():
        tensors = row(lengths, num_kv_heads, head_dim, dtype, "cuda")
        ours, expected = (with_gradients(kernel, tensors, lengths) for kernel in (packed_kernel(name), dense))
        for got, want in zip(ours, expected, strict=True):
            assert got.dtype == dtype
            assert (got.double() - want).abs().max() < 4 * torch.finfo(dtype).eps * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "head_dim", "name"),
    [
        ("cpu", None, torch.bfloat16, 64, "sdpa"),
        ("cuda", (9, 0), torch.bfloat16, 128, "varlen"),
        ("cuda", (8, 0), torch.float16, 64, "varlen"),
        ("cuda", (12, 0), torch.bfloat16, 8, "varlen"),
        ("cuda", (9, 0), torch.bfloat16, 192, "varlen"),
        ("cuda", (9, 0), torch.bfloat16, 256, "flex"),
        ("cuda", (9, 0), torch.bfloat16, 20, "flex"),
        ("cuda", (9, 0), torch.bfloat16, 12, "sdpa"),
        ("cuda", (9, 0), torch.float32, 128, "sdpa"),
        ("cuda", (7, 5), torch.bfloat16, 64, "sdpa"),
    ],
)
def test_the_choice(
    device: str, capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int, name: str
) -> None:
    assert fastest_kernel(device, capability, dtype, head_dim) == name


def test_the_choice_is_set_on_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    model = llada(vocab_size=50, embed_dim=32, num_layers=2, num_heads=4, mlp_dim=48, max_seq_len=16)
    attentions = [part for part in model.modules() if isinstance(part, BidirectionalAttention)]
    assert [attention.packed_attention for attention in attentions] == [bucketed_attention] * 2
    line = choose_packed_attention(model, torch.device("cuda"), torch.bfloat16)
    assert line == "packed attention: varlen (bf16 on sm_90, head size 8)"
    assert [attention.packed_attention for attention in attentions] == [packed_kernel("varlen")] * 2
    line = choose_packed_attention(model, torch.device("cpu"), torch.float32)
    assert line == "packed attention: sdpa (fp32 on cpu, head size 8)"
    assert [attention.packed_attention for attention in attentions] == [bucketed_attention] * 2


@heads
def test_varlen_is_called_as_this_version_of_torch_wants_it(num_kv_heads: int) -> None:
    """Without a GPU: shapes and types only, forward and backward."""
    q, k, v = (torch.empty(30, count, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
               for count in (4, num_kv_heads, num_kv_heads))  # fmt: skip
    out = packed_kernel("varlen")(q, k, v, PackedSequences.from_lengths([10, 20]).to(q.device))
    assert out.shape == q.shape and out.dtype == q.dtype
    out.sum().backward()
    assert q.grad is not None and k.grad is not None and k.grad.shape == k.shape
