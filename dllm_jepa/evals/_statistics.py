"""Intervals and tests: of one score, and of the difference of two scores on the same items."""

import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""

# Resampled values held at a time, 8 bytes each.
_MAX_RESAMPLED = 2**20


def wilson_interval(num_correct: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Score interval of a share, whose bounds lie in [0, 1]; unlike the textbook one it holds near 0 and 1.

    Args:
        num_correct: successes, in [0, n].
        n: trials, at least 1.
        z: two-sided point of the normal distribution.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if not 0 <= num_correct <= n or n < 1:
        raise ValueError(f"there must be 0 to n successes in at least one trial, got {num_correct} in {n}")
    share, z2 = num_correct / n, z * z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    margin = z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # Rounding must not cut off the share itself: at 0 and n successes one bound is exactly 0 or 1.
    return min(share, max(0.0, centre - margin)), max(share, min(1.0, centre + margin))


def mcnemar(b: int, c: int) -> float:
    """McNemar's exact test: the two-sided p that two sets of paired answers differ so much by chance.

    That is twice the smaller tail of a binomial distribution with b + c trials and probability 1/2, at most 1.

    Args:
        b: items that only the first one has right.
        c: items that only the second one has right.
    """
    if min(b, c) < 0:
        raise ValueError(f"counts must not be negative, got {b} and {c}")
    n, fewer = b + c, min(b, c)
    # The tail is its largest term, in logarithms since 2^n overflows, times a sum in which every term is a share of
    # the one before it.
    share = relative_sum = 1.0
    for count in range(fewer, 0, -1):
        share *= count / (n - count + 1)
        relative_sum += share
    log_term = math.lgamma(n + 1) - math.lgamma(fewer + 1) - math.lgamma(n - fewer + 1) - n * math.log(2)
    return min(1.0, 2 * math.exp(log_term) * relative_sum)


def newcombe_interval(both: int, only_a: int, only_b: int, neither: int, z: float = Z_95) -> tuple[float, float]:
    """Interval of the difference of two shares on the same items, second minus first.

    Args:
        both: items that both have right.
        only_a: items that only the first one has right.
        only_b: items that only the second one has right.
        neither: items that none has right.
        z: two-sided point of the normal distribution.

    Source: Newcombe 1998, "Improved confidence intervals for the difference between binomial proportions based on
    paired data", method 10: Wilson's intervals, joined with a continuity-corrected correlation.
    """
    if min(both, only_a, only_b, neither) < 0:
        raise ValueError(f"counts must not be negative, got {both}, {only_a}, {only_b} and {neither}")
    n, num_a, num_b = both + only_a + only_b + neither, both + only_a, both + only_b
    low_a, high_a = wilson_interval(num_a, n, z)
    low_b, high_b = wilson_interval(num_b, n, z)
    spread = math.sqrt(num_a * (n - num_a)) * math.sqrt(num_b * (n - num_b))
    association: float = both * neither - only_a * only_b
    if association > 0:
        association = max(0.0, association - n / 2)
    correlation = association / spread if spread else 0.0

    def margin(of_a: float, of_b: float) -> float:
        return math.sqrt(max(0.0, of_a * of_a - 2 * correlation * of_a * of_b + of_b * of_b))

    share_a, share_b = num_a / n, num_b / n
    difference = (num_b - num_a) / n
    low = difference - margin(high_a - share_a, share_b - low_b)
    high = difference + margin(share_a - low_a, high_b - share_b)
    return max(-1.0, low), min(1.0, high)


def bootstrap_interval(values: Sequence[float], *, seed: int = 0, num_draws: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of a mean, from means of values drawn anew with replacement.

    Source: Efron & Tibshirani 1993, "An introduction to the bootstrap", chapter 13.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"the values must be finite numbers, at least one; got {array.size}")
    generator = np.random.default_rng(seed)
    num_rows = max(1, _MAX_RESAMPLED // array.size)
    means = [
        array[generator.integers(array.size, size=(min(num_rows, num_draws - start), array.size))].mean(axis=1)
        for start in range(0, num_draws, num_rows)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)
