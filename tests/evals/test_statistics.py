"""Intervals and tests against closed forms, published tables, and what they promise: their coverage."""

import math
from fractions import Fraction

import numpy as np
import pytest

from dllm_jepa.evals._statistics import Z_95, bootstrap_interval, mcnemar, newcombe_interval, wilson_interval


# Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
@pytest.mark.parametrize(
    ("correct", "n", "expected"),
    [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_gives_the_published_intervals(correct: int, n: int, expected: tuple[float, float]) -> None:
    assert wilson_interval(correct, n) == pytest.approx(expected, abs=5e-5)


def test_wilson_bounds_are_the_shares_that_are_just_rejected() -> None:
    # By definition: |share - bound| = z * standard error at the bound.
    for correct, n, z in ((3, 7, 1.0), (1, 2, Z_95), (500, 1319, Z_95), (1318, 1319, Z_95)):
        for bound in wilson_interval(correct, n, z):
            assert abs(correct / n - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), rel=1e-9)
    for n in (1, 10, 10**7):
        margin = Z_95**2 / (n + Z_95**2)
        assert wilson_interval(0, n) == (0.0, pytest.approx(margin))
        assert wilson_interval(n, n) == (pytest.approx(1 - margin), 1.0)


def test_impossible_counts_and_values_are_refused() -> None:
    for counts in ((6, 5), (0, 0)):
        with pytest.raises(ValueError, match=f"got {counts[0]} in {counts[1]}"):
            wilson_interval(*counts)
    with pytest.raises(ValueError, match="got -1 and 3"):
        mcnemar(-1, 3)
    for table in ((1, -1, 2, 3), (0, 0, 0, 0)):
        with pytest.raises(ValueError, match="must"):
            newcombe_interval(*table)
    for values in ([], [1.0, math.nan], [math.inf]):
        with pytest.raises(ValueError, match="finite numbers"):
            bootstrap_interval(values)


def exact_p(b: int, c: int) -> Fraction:
    tail = sum(math.comb(b + c, count) for count in range(min(b, c) + 1))
    return min(Fraction(1), Fraction(2 * tail, 2 ** (b + c)))


def test_mcnemar_is_the_binomial_tail() -> None:
    for b in range(30):
        for c in range(30):
            assert mcnemar(b, c) == pytest.approx(float(exact_p(b, c)), rel=1e-12)
    assert mcnemar(400, 480) == mcnemar(480, 400) == pytest.approx(float(exact_p(400, 480)), rel=1e-10)
    assert mcnemar(0, 0) == 1.0 and mcnemar(1, 0) == pytest.approx(1.0)
    assert mcnemar(0, 10) == pytest.approx(2 / 1024)


def test_mcnemar_of_large_counts() -> None:
    assert mcnemar(0, 5000) == 0.0  # below the smallest float, without an overflow on the way
    assert mcnemar(50_000, 50_000) == 1.0
    # The normal distribution with its continuity correction, good to some 1/n.
    b, c = 50_000, 50_500
    z = (c - b - 1) / math.sqrt(b + c)
    assert mcnemar(b, c) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-4)


def test_newcombe_gives_the_published_interval() -> None:
    # Newcombe 1998 (paired data), table II, method 10: of 50 pairs 36 both, 12 and 2 one of them.
    assert newcombe_interval(36, 2, 12, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    assert newcombe_interval(36, 12, 2, 0) == pytest.approx((-0.3404, -0.0569), abs=5e-5)


def test_newcombe_without_any_difference() -> None:
    # All right in both: the correlation is not defined, and both margins are Wilson's.
    margin = 1 - wilson_interval(50, 50)[0]
    assert newcombe_interval(50, 0, 0, 0) == pytest.approx((-margin, margin))
    low, high = newcombe_interval(500, 0, 0, 500)
    assert low == pytest.approx(-high) and 0 < high < 0.01


def test_newcombe_covers_the_difference() -> None:
    generator = np.random.default_rng(0)
    shares = [0.6, 0.1, 0.2, 0.1]
    samples = [tuple(map(int, counts)) for counts in generator.multinomial(200, shares, size=2000)]
    intervals = [newcombe_interval(*sample) for sample in samples]
    # 0.95, with a standard error of 0.005 and Newcombe's own excess of about 0.01.
    assert 0.935 < sum(low <= 0.1 <= high for low, high in intervals) / 2000 < 0.98


def test_bootstrap_has_the_width_of_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 1000)
    low, high = bootstrap_interval(values.tolist())
    standard_error = values.std() / math.sqrt(1000)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.1 * standard_error)
    assert high - low == pytest.approx(2 * Z_95 * standard_error, rel=0.05)


def test_bootstrap_is_exact_where_the_means_are_few() -> None:
    # Of two values the means are 0, 1/2 and 1, with probabilities 1/4, 1/2 and 1/4.
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)
    assert bootstrap_interval([2.5]) == (2.5, 2.5)
    assert bootstrap_interval([True, False, True, True], num_draws=3000) == (0.25, 1.0)


def test_bootstrap_depends_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [float(value % 7) for value in range(100)]
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1, num_draws=500) != bootstrap_interval(values, seed=2, num_draws=500)
    whole = bootstrap_interval(values, seed=1, num_draws=999)
    monkeypatch.setattr("dllm_jepa.evals._statistics._MAX_RESAMPLED", 1000)
    assert bootstrap_interval(values, seed=1, num_draws=999) == whole
