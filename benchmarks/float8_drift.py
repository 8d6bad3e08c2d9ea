"""Drift of target embeddings when the products of the target encoder are float8, emulated on the CPU.

    python benchmarks/float8_drift.py [--checkpoint DIR ...] [--embed-dims 256 512 1024] [--layers 6] [--sequences 8]

Embeds one packed batch of target views with bf16 products and with float8 ones, and compares the two by cosine. Float8
products are those of all linear layers, scaled by tensor or by row, or those that `target_encoder.float8` converts
("ours"): by row, without values and outputs of attention. Weights are bf16 in both, as sharded
training gathers them. They are random ones of several widths, which no training has shaped, and those of checkpoints;
both also with outliers as large language models have them: 0.1 % of the hidden channels (one at least) are made 20
times as large in whatever writes to them, and as much smaller in the final norm. A checkpoint with tokenizer files
embeds built-in descriptions and regexes, other weights random tokens. The gradient of the JEPA loss, in fp32 with a
random predictor, is compared for either target, too; its cosine is over all weights of the online backbone.

Prints one JSON line a comparison and a table last. Exit code 1 if a checkpoint, as it is, has a cosine below 0.999 with
our products.
"""

import argparse
import copy
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torchao
from torch import Tensor, nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from tqdm import tqdm

from dllm_jepa import __version__
from dllm_jepa.data import BatchPlan, MicroBatch, TrainingBatches, regex_pairs
from dllm_jepa.jepa import EMATargetEncoder, pool, transformer_predictor, uniform_ratio_views
from dllm_jepa.models import InitialWeights, MaskedDiffusionLM, load_hf, tokenizer_builder, use_float8
from dllm_jepa.models.llada import llada
from dllm_jepa.trained_model import open_model

LEAST_COSINE = 0.999
OUTLIERS = 20.0
VOCAB_SIZE = 1024
MAX_TOKENS = 64


class RandomSequences:
    """Sequences of random tokens, the last half of each maskable; the last id is left for masks."""

    def __init__(self, vocab_size: int, count: int) -> None:
        """Draw `count` sequences."""
        self.lengths = np.full(count, MAX_TOKENS)
        self._tokens = np.random.default_rng(0).integers(0, vocab_size - 1, (count, MAX_TOKENS), dtype=np.int32)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._tokens)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Tokens and maskable positions of a sequence."""
        return self._tokens[index], np.arange(MAX_TOKENS) >= MAX_TOKENS // 2


def random_model(embed_dim: int, num_layers: int) -> MaskedDiffusionLM:
    """A LLaDA of 64-wide heads with initial weights."""
    heads = embed_dim // 64
    sizes = {"embed_dim": embed_dim, "num_layers": num_layers, "num_heads": heads, "num_kv_heads": heads}
    model = llada(vocab_size=VOCAB_SIZE, mlp_dim=3 * embed_dim, **sizes)
    weights = InitialWeights(model, seed=0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(weights.read(name))
    return model.eval()


def one_batch(model: MaskedDiffusionLM, path: Path | None, count: int) -> MicroBatch:
    """One packed micro-batch: random tokens, or regexes for a checkpoint with a tokenizer."""
    data: Any
    if path is None or tokenizer_builder(path) is None:
        data, mask_id = RandomSequences(model.sizes.vocab_size, count), model.sizes.vocab_size - 1
    else:
        tokenizer = open_model(path).tokenizer()
        data = regex_pairs(tokenizer, max_seq_len=256, num_pairs=4 * count, seed=0, shift_logits=model.shift_logits)
        mask_id = tokenizer.mask_id
    plan = BatchPlan(data.lengths, global_batch_size=count, tokens_per_device=256 * count, num_ranks=1, seed=0)
    batches = TrainingBatches(data, plan, uniform_ratio_views(), rank=0, seed=0, mask_id=mask_id, pad_id=0)
    return next(iter(batches.step(0)))


@torch.no_grad()
def add_outliers(model: MaskedDiffusionLM) -> MaskedDiffusionLM:
    """Enlarge a few hidden channels in all that writes to them; the final norm takes it back."""
    backbone, embed_dim = model.backbone, model.sizes.embed_dim
    channels = torch.randperm(embed_dim, generator=torch.Generator().manual_seed(0))[: max(1, round(embed_dim / 1000))]
    backbone.tok_embeddings.weight[:, channels] *= OUTLIERS
    for layer in backbone.layers:
        layer.attn.output_proj.weight[channels] *= OUTLIERS
        layer.mlp.w2.weight[channels] *= OUTLIERS
    backbone.norm.scale[channels] /= OUTLIERS
    return model


def embed(backbone: nn.Module, batch: MicroBatch, *, float8: bool) -> Tensor:
    """Target embeddings, fp32 [S, D]."""
    encoder = EMATargetEncoder(backbone, ema_decay=0.996)
    packing = {"mask": batch.attention_mask, "input_pos": batch.input_pos}
    return encoder.embed(batch.target, batch.target_ids, batch.num_sequences, **packing)


def gradients(model: MaskedDiffusionLM, batch: MicroBatch, targets: list[Tensor]) -> list[Tensor]:
    """The gradient of the JEPA loss with each target, over all weights of the online backbone, as one vector."""
    torch.manual_seed(0)
    predictor = transformer_predictor(model.sizes.embed_dim, model.sizes.mlp_dim)
    hidden = model.backbone(batch.context, mask=batch.attention_mask, input_pos=batch.input_pos)
    pred = predictor(pool(hidden, batch.context_ids, batch.num_sequences))
    params = list(model.backbone.parameters())
    flat = []
    for target in targets:
        loss = (1 - torch.cosine_similarity(target, pred, dim=-1)).mean()
        flat.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, params, retain_graph=True)]))
    return flat


def cosine_of_vectors(a: Tensor, b: Tensor) -> float:
    """In fp64: the sums are over millions of elements."""
    a, b = a.double(), b.double()
    return float(a @ b / (a.norm() * b.norm()))


def compare(name: str, outliers: bool, model: MaskedDiffusionLM, batch: MicroBatch) -> Iterator[dict[str, Any]]:
    """Compare the embeddings of all kinds of products with those of bf16 ones."""
    backbone = copy.deepcopy(model.backbone).bfloat16()
    whole = {"tensor": Float8LinearConfig(), "row": Float8LinearConfig.from_recipe_name("rowwise")}
    targets = {"bf16": embed(copy.deepcopy(backbone), batch, float8=False)}
    for scales, config in whole.items():
        converted = convert_to_float8_training(copy.deepcopy(backbone), config=replace(config, emulate=True))
        targets[f"all, by {scales}"] = embed(converted, batch, float8=True)
    targets["ours"] = embed(use_float8(copy.deepcopy(backbone), emulate=True), batch, float8=True)
    reference, *others = gradients(model, batch, list(targets.values()))
    for (products, target), gradient in zip([*targets.items()][1:], others, strict=True):
        cosine = torch.cosine_similarity(target, targets["bf16"], dim=-1)  # [S]
        yield {
            "weights": name,
            "outliers": outliers,
            "float8": products,
            "min_cosine": cosine.min().item(),
            "mean_cosine": cosine.mean().item(),
            "gradient_cosine": cosine_of_vectors(gradient, reference),
        }


def main() -> None:
    """Compare on all weights, with outliers and without."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, action="append", default=[], help="Hugging Face directory; repeat")
    parser.add_argument("--embed-dims", type=int, nargs="*", default=[256, 512, 1024], help="multiples of 64")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--sequences", type=int, default=8)
    arguments = parser.parse_args()
    sources = [(f"random, D {width}", None, width) for width in arguments.embed_dims]
    sources += [(f"checkpoint {path.name}", path, 0) for path in arguments.checkpoint]

    rows = []
    for name, path, width in tqdm(sources, unit="model", disable=None):
        model = random_model(width, arguments.layers) if path is None else load_hf(path)
        batch = one_batch(model, path, arguments.sequences)
        for outliers in (False, True):
            for row in compare(name, outliers, add_outliers(model) if outliers else model, batch):
                rows.append(row | {"held": path is not None and not outliers and row["float8"] == "ours"})
                tqdm.write(json.dumps(row), file=sys.stdout)

    print(
        f"\ndllm-jepa {__version__}, torch {torch.__version__}, torchao {torchao.__version__}, Python "
        f"{platform.python_version()}, {platform.machine()}, {os.cpu_count()} CPUs; {arguments.sequences} sequences, "
        f"{arguments.layers} layers of random weights\n"
    )
    print("| weights | outliers | float8 | cosine, minimum | cosine, mean | gradient, cosine |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['weights']} | {'yes' if row['outliers'] else 'no'} | {row['float8']} | {row['min_cosine']:.5f} | "
            f"{row['mean_cosine']:.5f} | {row['gradient_cosine']:.5f} |"
        )
    sys.exit(0 if all(row["min_cosine"] >= LEAST_COSINE for row in rows if row["held"]) else 1)


if __name__ == "__main__":
    main()
