"""Which token is picked for a masked position, by which random numbers, and how sure that is.

Shape legend: B rows, m scored tokens of a row, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Far enough down for a probability of zero in fp32, whatever the scores: no score is above the highest one.
_CUT = 1e4


@dataclass(frozen=True)
class RowNoise:
    """The random numbers of one step, from one generator per row: a row's do not depend on the rows beside it.

    Args:
        generators: one per row, on the device of the model.
        counts: tokens of each row that are to get random numbers, the first ones; rows with 0 draw nothing.
        num_columns: scored tokens of a row, m.
    """

    generators: Sequence[torch.Generator]
    counts: Sequence[int]
    num_columns: int

    def uniform(self) -> Tensor:
        """float64 [B, m], uniform in [0, 1); 0 behind the first `counts` of a row."""
        device = self.generators[0].device
        drawn = torch.zeros(len(self.counts), self.num_columns, dtype=torch.float64, device=device)
        for row, count, generator in zip(drawn, self.counts, self.generators, strict=True):
            row[:count] = torch.rand(count, dtype=torch.float64, generator=generator, device=device)
        return drawn

    def part(self, rows: slice, columns: slice) -> "RowNoise":
        """The random numbers of some rows and columns; the parts of a row are to draw theirs from left to right."""
        width = columns.stop - columns.start
        counts = [min(max(count - columns.start, 0), width) for count in self.counts[rows]]
        return RowNoise(self.generators[rows], counts, width)

    def gumbel_rows(self, vocab_size: int) -> Iterator[Tensor]:
        """Gumbel noise float64 [count, V] for every row in turn, so that never more than one row's is in memory."""
        for count, generator in zip(self.counts, self.generators, strict=True):
            shape = (count, vocab_size)
            yield gumbel(torch.rand(shape, dtype=torch.float64, generator=generator, device=generator.device))


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel noise from uniform numbers in float64, in their place.

    In fp32 the tail of the noise would be cut, which lowers the diversity (Zheng et al. 2024, arXiv 2409.02908).
    """
    return uniform.log_().neg_().log_().neg_()


@dataclass(frozen=True)
class Sampling:
    """Picks from softmax(logits / temperature), cut to the likeliest tokens; at temperature 0 the likeliest one.

    Args:
        top_p: keep the fewest likeliest tokens with more than this probability together, in (0, 1]; None keeps all.
        top_k: keep as many tokens, at least 1; None keeps all.
        sharpen_confidence: confidences are measured after temperature and cuts (Dream) instead of before (LLaDA).

    Source: for the argmax over Gumbel noise, which is a draw from the softmax, ML-GSAI/LLaDA, generate.py,
        `add_gumbel_noise`; for the cuts and their order DreamLM/Dream, generation_utils.py, `sample_tokens`.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    sharpen_confidence: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")

    def __call__(self, logits: Tensor, banned: Tensor, noise: RowNoise) -> tuple[Tensor, Tensor]:
        """Pick.

        Args:
            logits: fp32 [B, m, V].
            banned: bool [V], True at ids that are never picked.
            noise: random numbers of the step.

        Returns:
            Token ids [B, m], and the logits [B, m, V] in which confidences are measured.
        """
        scores = logits / self.temperature if self.temperature > 0 else logits
        if self.top_p is not None:
            scores = _cut_to_top_p(scores, self.top_p)
        if self.top_k is not None:
            scores = _cut_to_top_k(scores, self.top_k)
        # What is cut keeps its order: where nothing else is allowed, the likeliest of it is still found.
        allowed = scores.masked_fill(banned, -torch.inf)
        if self.temperature > 0:
            picked = torch.zeros(allowed.shape[:2], dtype=torch.int64, device=allowed.device)
            for row, row_noise, ids in zip(allowed, noise.gumbel_rows(allowed.size(-1)), picked, strict=True):
                ids[: len(row_noise)] = row_noise.add_(row[: len(row_noise)]).argmax(-1)
        else:
            picked = allowed.argmax(-1)
        return picked, scores if self.sharpen_confidence else logits


def _cut_to_top_p(scores: Tensor, top_p: float) -> Tensor:
    ordered, order = scores.sort(dim=-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1).roll(1, dims=-1)  # probability of all that are likelier
    before[..., 0] = 0.0
    cut = _CUT * (before > top_p).to(scores.dtype)
    return scores - torch.zeros_like(scores).scatter(-1, order, cut)


def _cut_to_top_k(scores: Tensor, top_k: int) -> Tensor:
    lowest_kept = scores.topk(min(top_k, scores.size(-1))).values[..., -1:]
    return torch.where(scores < lowest_kept, scores - _CUT, scores)


def probability(scores: Tensor, picked: Tensor, noise: RowNoise) -> Tensor:
    """The probability of the picked token."""
    return (scores.gather(-1, picked[..., None]).squeeze(-1) - scores.logsumexp(-1)).exp()


def margin(scores: Tensor, picked: Tensor, noise: RowNoise) -> Tensor:
    """How much likelier the likeliest token is than the second one."""
    first, second = (scores.topk(2).values - scores.logsumexp(-1, keepdim=True)).exp().unbind(-1)
    return first - second


def negative_entropy(scores: Tensor, picked: Tensor, noise: RowNoise) -> Tensor:
    """The sum of p log(p + 1e-10) over the vocabulary: 0 where the model is certain, else below."""
    probabilities = scores.softmax(-1)
    return (probabilities * (probabilities + 1e-10).log()).sum(-1)


def random_order(scores: Tensor, picked: Tensor, noise: RowNoise) -> Tensor:
    """Random numbers: any token may come first."""
    return noise.uniform().float()


CONFIDENCES: dict[str, Callable[[Tensor, Tensor, RowNoise], Tensor]] = {
    "probability": probability,
    "margin": margin,
    "negative_entropy": negative_entropy,
    "random": random_order,
}
"""By name: from the logits [B, m, V], the picked ids [B, m] and random numbers to confidences, fp32 [B, m]."""


def perturbed(confidence: Tensor, temperature: float, noise: RowNoise) -> Tensor:
    """An order [B, m] drawn from the confidences: the highest k are k draws without replacement from their softmax.

    The higher the temperature, the less the confidences count.
    """
    return confidence.double() / temperature + gumbel(noise.uniform())
