"""Floating-point operations of a training step, from the sizes of its modules.

Shape legend: S sequences, N tokens of all of them together, n scored tokens.
"""

from torch import nn

from dllm_jepa.models._masked_diffusion_lm import MaskedDiffusionLM


def step_flops(
    trained: nn.ModuleDict, *, tokens: int, squared_lengths: int, scored: int, sequences: int, target: bool
) -> float:
    """FLOPs that the method itself needs, by the usual count for model FLOPs utilization (MFU).

    A multiply-add is two. Counted are the products of linear layers and of attention, in which every token of a
    sequence sees all of it. A trained layer costs three times its forward, a frozen one twice, because the gradient
    passes through it; that it does not before the first adapter, in a part of the first layer, is neglected. What is
    computed twice, as with activation checkpointing, counts once; what only the implementation needs (norms of DoRA,
    unpacked NF4), padding, pooling, optimizer and EMA do not count.

    Args:
        trained: `model`, and `predictor` if there is one, on any device, sharded or not.
        tokens: N, of the context views; the target views have as many.
        squared_lengths: sum over the sequences of their squared lengths in tokens.
        scored: n, tokens that the head is evaluated at.
        sequences: S, rows of the predictor.
        target: with the target branch, which has no gradient and no head, and the predictor.

    Source: PaLM, arXiv 2204.02311, appendix B.
    """
    model = trained["model"]
    assert isinstance(model, MaskedDiffusionLM), type(model)
    attention = 4 * model.sizes.num_layers * model.sizes.embed_dim * squared_lengths  # q @ k.T, and its product with v
    body_forward, body_step = _flops_of_a_row(model.backbone.layers)
    _, head_step = _flops_of_a_row(model.head or model.backbone.tok_embeddings)
    flops = tokens * body_step + 3 * attention + scored * head_step
    if target:
        flops += tokens * body_forward + attention
        if "predictor" in trained:
            flops += sequences * _flops_of_a_row(trained["predictor"])[1]
    return float(flops)


def _flops_of_a_row(module: nn.Module) -> tuple[int, int]:
    """FLOPs of the products of one row with the matrices of a module: of a forward, and of forward and backward."""
    forward = trained = 0
    for param in module.parameters():
        if param.ndim == 2:
            forward += 2 * param.numel()
            trained += 2 * param.numel() * param.requires_grad
    return forward, 2 * forward + trained
