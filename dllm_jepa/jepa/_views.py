"""The two maskings of a sequence.

A draw is a pure function of (seed, epoch, sample index, view): never of rank, worker, micro-batch or a global
generator. So one GPU and eight, packed and padded, interrupted and uninterrupted runs see the same masks.

Shape legend: T tokens of one sequence.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

SMALLEST_RATIO = 1e-3
"""Floor of a drawn mask ratio, as in LLaDA's training code: 1/t weights stay finite."""


@dataclass(frozen=True)
class View:
    """One masking of a sequence.

    Args:
        tokens: int64 [T], the sequence with the mask token at masked positions.
        masked: bool [T], the positions that were replaced; at least one, and at least one token is left.
        mask_ratio: the probability t in (0, 1] that was drawn for the sequence.
    """

    tokens: IntArray
    masked: BoolArray
    mask_ratio: float


@dataclass(frozen=True)
class Views:
    """The lightly masked context view and the heavily masked target view of one sequence."""

    context: View
    target: View


class ViewSampler:
    """Draws both views of a sequence.

    Args:
        draw_ratios: gives (context ratio, target ratio), each in (0, 1], from a generator.
        exact_count: mask exactly round(t * n) of the n maskable tokens instead of each with probability t.
        nested: the target mask contains the context mask: both masks come from the same uniforms.
    """

    def __init__(
        self, draw_ratios: Callable[[np.random.Generator], tuple[float, float]], *, exact_count: bool, nested: bool
    ) -> None:
        self._draw_ratios = draw_ratios
        self._exact_count = exact_count
        self._nested = nested

    def __call__(
        self, tokens: IntArray, maskable: BoolArray, *, mask_id: int, seed: int, epoch: int, index: int
    ) -> Views:
        """Draw the views of one sequence.

        Args:
            tokens: int64 [T], the clean sequence, without padding.
            maskable: bool [T], positions that may be masked; at least one.
            mask_id: id of the mask token.
            seed: seed of the run, in [0, 2**64).
            epoch: epoch number from 0.
            index: index of the sample in its dataset.

        Returns:
            The views. A mask is never empty and never hides the whole sequence.

        Raises:
            ValueError: if no position is maskable, or nothing stands beside the only one.
        """
        if not maskable.any() or len(tokens) < 2:
            raise ValueError(
                f"sample {index}: a view needs a maskable token and another one beside it, got {len(tokens)} tokens "
                f"of which {int(maskable.sum())} maskable"
            )
        # One stream a sample, read in a fixed order: the ratios, the context's uniforms, the target's.
        # Philox is counter-based: the key and the upper counter words name the sample, no state is carried over.
        generator = np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, index, epoch]))
        context_ratio, target_ratio = self._draw_ratios(generator)
        positions = np.flatnonzero(maskable)
        context_uniforms = generator.random(len(positions))
        target_uniforms = context_uniforms if self._nested else generator.random(len(positions))
        return Views(
            self._mask(tokens, positions, mask_id, context_ratio, context_uniforms),
            self._mask(tokens, positions, mask_id, target_ratio, target_uniforms),
        )

    def _mask(
        self, tokens: IntArray, positions: IntArray, mask_id: int, mask_ratio: float, uniforms: npt.NDArray[np.float64]
    ) -> View:
        # The masked positions are always those of the smallest uniforms: for a Bernoulli draw those below the ratio.
        # Raising or lowering the count then keeps masks nested and as random as they can be.
        if self._exact_count:
            count = math.floor(mask_ratio * len(positions) + 0.5)
        else:
            count = int((uniforms < mask_ratio).sum())
        count = min(max(count, 1), len(positions), len(tokens) - 1)
        masked = np.zeros(len(tokens), dtype=np.bool_)
        masked[positions[np.argsort(uniforms, kind="stable")[:count]]] = True
        return View(np.where(masked, mask_id, tokens), masked, mask_ratio)


def fixed_ratio_views(
    *, context_ratio: float = 0.2, target_ratio: float = 0.7, exact_count: bool = False, nested: bool = False
) -> ViewSampler:
    """The paper's views: the same two ratios for every sequence.

    Args:
        context_ratio: t_L in (0, 1).
        target_ratio: t_H in (0, 1), above `context_ratio`.
        exact_count: mask exactly round(t * n) of the n maskable tokens.
        nested: the target mask contains the context mask.

    Source: DLLM-JEPA, arXiv 2606.00091; (0.1, 0.9) is its "wide" setting.
    """
    for name, ratio in (("context_ratio", context_ratio), ("target_ratio", target_ratio)):
        if not 0 < ratio < 1:
            raise ValueError(f"{name} must be in (0, 1), got {ratio}")
    if context_ratio >= target_ratio:
        raise ValueError(
            f"context_ratio ({context_ratio}) must be below target_ratio ({target_ratio}): the context view is the "
            "lightly masked one"
        )
    return ViewSampler(lambda _: (context_ratio, target_ratio), exact_count=exact_count, nested=nested)


def uniform_ratio_views(
    *,
    context_range: tuple[float, float] | list[float] = (0.0, 1.0),
    target_range: tuple[float, float] | list[float] | None = None,
    target_gap: float | None = None,
    exact_count: bool = False,
    nested: bool = False,
) -> ViewSampler:
    """Ratios drawn anew for every sequence: for training from scratch, and for the LLaDA objective.

    Args:
        context_range: t_L ~ U(low, high), both in [0, 1].
        target_range: t_H ~ U(max(low, t_L), high), both in [0, 1]; default [0, 1].
        target_gap: instead of a range: t_H = min(t_L + target_gap, 1), gap in (0, 1).
        exact_count: mask exactly round(t * n) of the n maskable tokens.
        nested: the target mask contains the context mask.
    """
    if target_range is not None and target_gap is not None:
        raise ValueError("target_range and target_gap exclude each other: set one of them")
    context_low, context_high = _check_range("context_range", context_range)
    target_low, target_high = _check_range("target_range", (0.0, 1.0) if target_range is None else target_range)
    if target_high < context_high:
        raise ValueError(
            f"target_range must reach at least as high as context_range ({context_high}), got an end of {target_high}"
        )
    if target_high <= max(context_low, SMALLEST_RATIO):
        raise ValueError(
            f"no target ratio lies above the context's: context_range begins at {context_low} (a drawn ratio is never "
            f"below {SMALLEST_RATIO}) and target_range ends at {target_high}"
        )
    if target_gap is not None and not 0 < target_gap < 1:
        raise ValueError(f"target_gap must be in (0, 1), got {target_gap}")

    def draw(generator: np.random.Generator) -> tuple[float, float]:
        first, second = generator.random(2)
        context_ratio = max(float(context_low + (context_high - context_low) * first), SMALLEST_RATIO)
        if target_gap is not None:
            return context_ratio, min(context_ratio + target_gap, 1.0)
        low = max(target_low, context_ratio)
        return context_ratio, float(low + (target_high - low) * second)

    return ViewSampler(draw, exact_count=exact_count, nested=nested)


def _check_range(name: str, bounds: tuple[float, float] | list[float]) -> tuple[float, float]:
    if len(bounds) != 2:
        raise ValueError(f"{name} must be [low, high], got {list(bounds)}")
    low, high = bounds
    if not 0 <= low <= 1 or not 0 <= high <= 1:
        raise ValueError(f"ends of {name} must be in [0, 1], got {list(bounds)}")
    if low > high or high == 0:
        raise ValueError(f"{name} must be [low, high] with low <= high and high > 0, got {list(bounds)}")
    return low, high
