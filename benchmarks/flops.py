"""FLOPs of one training step at the published geometries, counted on the meta device (no memory, no weights).

    python benchmarks/flops.py [--model llada_8b|dream_7b] [--sequences 16] [--tokens 512] [--mask-ratio 0.2]

Prints one JSON line a variant and a table of ratios last. The step is made of the library's own calls: the target
embedding, the forward with logits at the masked positions, both losses, the backward. Optimizer and EMA are not
matrix products and are not counted.

Activation checkpointing comes in two kinds: "full" recomputes every layer whole; "early stop" is PyTorch's default, and
ours, which ends a recomputation at the last activation that the backward needs, and so leaves out each layer's last
product. It makes both sides cheaper, the plain diffusion step by more.
"""

import argparse
import json
import platform
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.training import set_activation_checkpointing

from dllm_jepa import __version__
from dllm_jepa.jepa import (
    GlobalCounts,
    ema_target_encoder,
    jepa_loss,
    masked_token_loss,
    masked_token_weights,
    pool,
    transformer_predictor,
)
from dllm_jepa.models import MaskedDiffusionLM
from dllm_jepa.models.dream import dream_7b
from dllm_jepa.models.llada import llada_8b

CHECKPOINTING = ("none", "full", "early stop")
MODELS = {"llada_8b": llada_8b, "dream_7b": dream_7b}


def step_flops(name: str, *, sequences: int, tokens: int, scored: int, jepa: bool, checkpointing: str) -> int:
    """FLOPs of the forward and backward passes of one step.

    Args:
        name: a key of MODELS.
        sequences: sequences of the step.
        tokens: tokens of each.
        scored: positions of a sequence that the head is evaluated at.
        jepa: with target branch and predictor.
        checkpointing: one of CHECKPOINTING.
    """
    with torch.device("meta"):
        model = MODELS[name]()
        view = torch.zeros(sequences, tokens, dtype=torch.int64)
        ids = torch.zeros(sequences, tokens, dtype=torch.int64)
        positions = torch.zeros(sequences * scored, dtype=torch.int64)
        per_sequence = torch.ones(sequences, dtype=torch.int64)
        predictor = transformer_predictor(model.sizes.embed_dim, model.sizes.mlp_dim)
        target_encoder = ema_target_encoder(MODELS[name]().backbone) if jepa else None
    counts = GlobalCounts(sequences, sequences * scored, sequences * tokens, sequences * tokens)
    if checkpointing != "none":
        set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(checkpointing != "full"):
        target = None if target_encoder is None else target_encoder.embed(view, ids, sequences)
        hidden, logits = model(view, logits_at=positions)
        weights = masked_token_weights(
            "mean",
            counts,
            sequence_of_masked=positions,
            mask_ratio=per_sequence.float(),
            num_masked=per_sequence,
            num_maskable=per_sequence,
        )
        loss = (weights * masked_token_loss(logits, positions)).sum()
        if target is not None:
            loss = loss + jepa_loss(target, predictor(pool(hidden, ids, sequences)), counts)
        loss.backward()
    return counter.get_total_flops()


def measure(name: str, sequences: int, tokens: int, mask_ratio: float) -> dict[tuple[str, str], int]:
    """FLOPs of every variant, by (variant, checkpointing); prints each as a JSON line."""
    masked = round(tokens * mask_ratio)
    variants = {"full_head": (tokens, False), "diffusion": (masked, False), "dllm_jepa": (masked, True)}
    flops = {}
    for checkpointing in CHECKPOINTING:
        for variant, (scored, jepa) in variants.items():
            total = step_flops(
                name, sequences=sequences, tokens=tokens, scored=scored, jepa=jepa, checkpointing=checkpointing
            )
            flops[variant, checkpointing] = total
            row = {"model": name, "variant": variant, "activation_checkpointing": checkpointing}
            print(json.dumps(row | {"gflop_per_token": round(total / (sequences * tokens) / 1e9, 2)}))
    return flops


def print_table(flops: dict[tuple[str, str], int]) -> None:
    """The ratios that the design sets limits for."""
    rows = [
        ("DLLM-JEPA / our diffusion step", "dllm_jepa", "diffusion"),
        ("DLLM-JEPA / diffusion step with the head on every token", "dllm_jepa", "full_head"),
        ("our diffusion step / the same with the head on every token", "diffusion", "full_head"),
    ]
    print("\n| ratio | no checkpointing | full | early stop |\n|---|---|---|---|")
    for label, above, below in rows:
        ratios = (flops[above, kind] / flops[below, kind] for kind in CHECKPOINTING)
        print(f"| {label} | {' | '.join(f'{ratio:.3f}' for ratio in ratios)} |")


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
    print(f"dllm-jepa {__version__}, torch {torch.__version__}, Python {platform.python_version()}, meta device")
    with torch.device("meta"):
        model: MaskedDiffusionLM = MODELS[args.model]()
        predictor = transformer_predictor(model.sizes.embed_dim, model.sizes.mlp_dim)
    print(f"{args.model}: {num_parameters([model]):,} parameters, predictor {num_parameters([predictor]):,}")
    print_table(measure(args.model, args.sequences, args.tokens, args.mask_ratio))


if __name__ == "__main__":
    main()
