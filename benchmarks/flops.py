"""FLOPs of one training step at the published geometries, counted on the meta device (no memory, no weights).

    python benchmarks/flops.py [--model llada_8b|dream_7b] [--sequences 16] [--tokens 512] [--mask-ratio 0.2]

Prints one JSON line a method and a table of ratios last. The step is made of the library's own calls. Optimizer and EMA
are not matrix products and are not counted.

Methods: `full_diffusion` is plain diffusion with the head on every token, `diffusion` and `dllm_jepa` are ours.
`llm_jepa` takes the gradient through both views, as LLM-JEPA (arXiv 2509.14252) does: a forward and a backward pass of
each, no average, and the head at the masked tokens of the context view only, as in ours.

Activation checkpointing comes in two kinds: "full" recomputes every layer whole; "early stop" is PyTorch's default, and
ours, which ends a recomputation at the last activation that the backward needs, and so leaves out each layer's last
product. It makes both sides cheaper, the plain diffusion step by more.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from _machine import describe_machine
from torch import nn
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from dllm_jepa.jepa import (
    EMATargetEncoder,
    GlobalCounts,
    jepa_loss,
    pool,
    transformer_predictor,
)
from dllm_jepa.models import MaskedDiffusionLM
from dllm_jepa.models.dream import dream_7b
from dllm_jepa.models.llada import llada_8b

CHECKPOINTING = ("none", "full", "early stop")
MODELS = {"llada_8b": llada_8b, "dream_7b": dream_7b}
RATIOS = (
    ("DLLM-JEPA / our diffusion step", "dllm_jepa", "diffusion"),
    ("DLLM-JEPA / diffusion step with the head on every token", "dllm_jepa", "full_diffusion"),
    ("our diffusion step / the same with the head on every token", "diffusion", "full_diffusion"),
    ("DLLM-JEPA / LLM-JEPA", "dllm_jepa", "llm_jepa"),
    ("LLM-JEPA / our diffusion step", "llm_jepa", "diffusion"),
)
LIMITS = {"none": 1.34, "full": 1.26}  # of the first ratio

# PyTorch knows the product that makes a new tensor, not the one that is added to a tensor in place.
IN_PLACE = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}


@dataclass(frozen=True)
class Method:
    """What a step computes.

    Args:
        everywhere: the head scores every token of the context view, not only the masked ones.
        target: what embeds the target view: the average, the online model with a gradient, or nothing.
    """

    everywhere: bool = False
    target: Literal["average", "online"] | None = None


METHODS = {
    "full_diffusion": Method(everywhere=True),
    "diffusion": Method(),
    "dllm_jepa": Method(target="average"),
    "llm_jepa": Method(target="online"),
}


def count_flops(
    name: str, method: Method, *, sequences: int, tokens: int, mask_ratio: float, checkpointing: str
) -> int:
    """FLOPs of the forward and backward passes of one step.

    Args:
        name: a key of MODELS.
        method: what is computed.
        sequences: sequences of the step.
        tokens: tokens of each.
        mask_ratio: share of the tokens that the context view masks.
        checkpointing: one of CHECKPOINTING.
    """
    scored = sequences * (tokens if method.everywhere else round(tokens * mask_ratio))
    with torch.device("meta"):
        model = MODELS[name]()
        view = torch.zeros(sequences, tokens, dtype=torch.int64)
        labels, weights = torch.zeros(scored, dtype=torch.int64), torch.ones(scored)
        predictor = transformer_predictor(model.sizes.embed_dim, model.sizes.mlp_dim)
        average = EMATargetEncoder(MODELS[name]().backbone, ema_decay=0.996) if method.target == "average" else None
    counts = GlobalCounts(sequences, scored, *2 * [sequences * tokens], sequences * tokens**2)
    if checkpointing != "none":
        model.checkpoint_layers()
    # The view stands for the ids of its visible tokens, and the labels for their positions: the values do not matter.
    with (
        FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter,
        set_checkpoint_early_stop(checkpointing != "full"),
    ):
        target = None if average is None else average.embed(view, view, sequences)
        if method.target == "online":
            target = pool(model(view), view, sequences)
        hidden = model(view)
        loss, _ = model.score(hidden, labels, labels=labels, token_weights=weights, chunk_tokens=1024)
        if target is not None:
            pred = predictor(pool(hidden, view, sequences))
            # The loss of ours stops the gradient at the target; that of LLM-JEPA does not.
            loss = loss + jepa_loss(target, pred, counts)
            if method.target == "online":
                loss = loss + jepa_loss(pred, target, counts)
        loss.backward()
    return counter.get_total_flops()


def measure(name: str, sequences: int, tokens: int, mask_ratio: float) -> dict[tuple[str, str], int]:
    """FLOPs of every method, by (method, checkpointing); prints each as a JSON line."""
    flops = {}
    for checkpointing in CHECKPOINTING:
        for method, what in METHODS.items():
            total = count_flops(
                name, what, sequences=sequences, tokens=tokens, mask_ratio=mask_ratio, checkpointing=checkpointing
            )
            flops[method, checkpointing] = total
            row = {"model": name, "method": method, "activation_checkpointing": checkpointing}
            print(json.dumps(row | {"gflop_per_token": round(total / (sequences * tokens) / 1e9, 2)}), flush=True)
    return flops


def print_table(flops: dict[tuple[str, str], int]) -> None:
    """The ratios, with the limits that the design sets them."""
    print("\n| ratio | no checkpointing | full | early stop |\n|---|---|---|---|")
    for label, above, below in RATIOS:
        ratios = (flops[above, kind] / flops[below, kind] for kind in CHECKPOINTING)
        print(f"| {label} | {' | '.join(f'{ratio:.3f}' for ratio in ratios)} |")
    print(f"| limit of the first | {' | '.join(f'{LIMITS[kind]:.2f}' for kind in CHECKPOINTING if kind in LIMITS)} | |")


def num_parameters(modules: Iterable[nn.Module]) -> int:
    """Parameters of some modules together."""
    return sum(param.numel() for module in modules for param in module.parameters())


def main() -> None:
    """Read the arguments, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="llada_8b")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--mask-ratio", type=float, default=0.2, help="of the context view, over all tokens")
    args = parser.parse_args()
    print(f"{describe_machine('meta')}, meta device")
    with torch.device("meta"):
        model: MaskedDiffusionLM = MODELS[args.model]()
        predictor = transformer_predictor(model.sizes.embed_dim, model.sizes.mlp_dim)
    print(f"{args.model}: {num_parameters([model]):,} parameters, predictor {num_parameters([predictor]):,}")
    print_table(measure(args.model, args.sequences, args.tokens, args.mask_ratio))


if __name__ == "__main__":
    main()
