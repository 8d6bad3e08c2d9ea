"""Decoding of one prompt in plain loops; a cache is a full pass into which old keys and values are put back."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dllm_jepa.models import MaskedDiffusionLM


class StalePasses:
    """Full passes over one row that can keep the key and value projections of an earlier pass at some columns."""

    def __init__(self, model: MaskedDiffusionLM) -> None:
        self.model = model
        self.kept: dict[Any, Tensor] = {}

    def projections(self) -> Iterator[torch.nn.Module]:
        for layer in self.model.backbone.layers:
            yield from (layer.attn.k_proj, layer.attn.v_proj)

    @contextmanager
    def hooked(self, fresh: slice) -> Iterator[None]:
        def hook(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
            if module in self.kept:
                output = torch.cat(
                    (self.kept[module][:, : fresh.start], output[:, fresh], self.kept[module][:, fresh.stop :]), dim=1
                )
            self.kept[module] = output
            return output

        handles = [module.register_forward_hook(hook) for module in self.projections()]
        yield
        for handle in handles:
            handle.remove()

    def logits(self, tokens: Tensor, fresh: slice, *, refresh: bool) -> Tensor:
        """[T, V] for a row [T]; only those of `fresh` columns mean something unless everything is refreshed."""
        if refresh:
            self.kept.clear()
        with self.hooked(fresh), torch.no_grad():
            return self.model.token_logits(tokens[None])[0]


def even(steps: int) -> Callable[[int, int, int], int]:
    """LLaDA's list of counts, from the published description: n // steps each, one more for the first n % steps."""

    def count(left: int, step: int, block: int) -> int:
        return block // steps + (step < block % steps)

    return count


def noise_levels(steps: int, eps: float = 1e-3) -> Callable[[int, int, int], int]:
    """Dream's counts."""

    def count(left: int, step: int, block: int) -> int:
        t = torch.linspace(1, eps, steps + 1)
        return left if step == steps - 1 else int(left * (1 - t[step + 1] / t[step]))

    return count


def confidence_of(kind: str, logits: Tensor, token: int) -> float:
    p = logits.softmax(-1)
    if kind == "margin":
        first, second = sorted(p.tolist(), reverse=True)[:2]
        return first - second
    if kind == "negative_entropy":
        return sum(x * math.log(x + 1e-10) for x in p.tolist())
    return float(p[token])


def num_sure(confidences: list[float], threshold: float | None, factor: float | None) -> int:
    """How many of the confidences, from the highest down, a speed-up commits."""
    if threshold is not None:
        return max(1, sum(c >= threshold for c in confidences))
    if factor is not None:
        return max([1, *(n for n, c in enumerate(confidences, 1) if (n + 1) * (1 - c) < factor)])
    return 0


def plain_decode(
    model: MaskedDiffusionLM,
    prompt: list[int],
    mask_id: int,
    *,
    gen_length: int,
    block_length: int,
    count: Callable[[int, int, int], int],
    kind: str = "probability",
    threshold: float | None = None,
    factor: float | None = None,
    cache: str = "none",
    refresh_every: int | None = None,
) -> list[int]:
    """Greedy generation for one prompt."""
    tokens = torch.tensor([*prompt, *[mask_id] * gen_length])
    passes = StalePasses(model)
    for start in range(len(prompt), len(tokens), block_length):
        stop = min(start + block_length, len(tokens))
        step = 0
        while masked := [column for column in range(start, stop) if tokens[column] == mask_id]:
            planned = count(len(masked), step, stop - start)
            refresh = cache == "none" or (step % refresh_every == 0 if refresh_every else step == 0)
            fresh = slice(start - model.shift_logits, len(tokens) if cache == "prefix" else stop)
            logits = passes.logits(tokens, slice(0, len(tokens)) if refresh else fresh, refresh=refresh)
            allowed = logits.clone()
            allowed[:, mask_id] = -math.inf
            picked = allowed.argmax(-1)
            sure = {column: confidence_of(kind, logits[column], int(picked[column])) for column in masked}
            order = sorted(masked, key=lambda column: -sure[column])
            number = max(planned, num_sure([sure[column] for column in order], threshold, factor))
            for column in order[:number]:
                tokens[column] = picked[column]
            step += 1
    return tokens[len(prompt) :].tolist()
