"""The two maskings of a sequence: pure draws, the right rates, and never a view without a masked or a visible token."""

import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import dllm_jepa.jepa
from dllm_jepa.jepa import Views, ViewSampler, fixed_ratio_views, uniform_ratio_views

MASK_ID = 999
SIGMAS = 5
"""Tolerance of the statistics, in standard deviations; seeds are fixed, so a test that passes once always passes."""


def draw(
    sampler: ViewSampler,
    length: int = 64,
    maskable: npt.NDArray[np.bool_] | None = None,
    *,
    seed: int = 0,
    epoch: int = 0,
    index: int = 0,
) -> Views:
    tokens = np.arange(length, dtype=np.int64)
    mask = np.ones(length, dtype=np.bool_) if maskable is None else maskable
    return sampler(tokens, mask, mask_id=MASK_ID, seed=seed, epoch=epoch, index=index)


def fingerprint(views: Views) -> tuple[bytes, bytes, float, float]:
    context, target = views.context, views.target
    return context.masked.tobytes(), target.masked.tobytes(), context.mask_ratio, target.mask_ratio


def standard_deviation_of_rate(rate: float, draws: int) -> float:
    return math.sqrt(rate * (1 - rate) / draws)


@pytest.mark.parametrize("sampler", [fixed_ratio_views(), uniform_ratio_views()], ids=["fixed", "uniform"])
def test_a_draw_depends_on_nothing_that_was_drawn_before(sampler: ViewSampler) -> None:
    names = list(itertools.product(range(2), range(2), range(20)))
    first = {name: fingerprint(draw(sampler, seed=name[0], epoch=name[1], index=name[2])) for name in names}
    np.random.seed(1)
    for seed, epoch, index in reversed(names):
        np.random.random(3)
        draw(sampler, length=7, seed=5, index=index)
        assert fingerprint(draw(sampler, seed=seed, epoch=epoch, index=index)) == first[seed, epoch, index]


def test_a_draw_moves_no_global_generator() -> None:
    np.random.seed(3)
    before = np.random.random(4)
    np.random.seed(3)
    draw(uniform_ratio_views())
    assert np.array_equal(before, np.random.random(4))


def test_another_process_draws_the_same() -> None:
    """With another hash seed; the module needs NumPy alone, so the process starts fast."""
    script = (
        "import runpy, sys, numpy as np\n"
        "sampler = runpy.run_path(sys.argv[1])['uniform_ratio_views']()\n"
        "for index in (9, 2, 5):\n"
        "    views = sampler(np.arange(64), np.ones(64, bool), mask_id=999, seed=11, epoch=3, index=index)\n"
        "    context, target = views.context, views.target\n"
        "    print(context.masked.tobytes().hex(), target.masked.tobytes().hex(), repr(target.mask_ratio))\n"
    )
    path = Path(dllm_jepa.jepa.__file__).with_name("_views.py")
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        env={"PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = [draw(uniform_ratio_views(), seed=11, epoch=3, index=index) for index in (9, 2, 5)]
    expected = [
        f"{v.context.masked.tobytes().hex()} {v.target.masked.tobytes().hex()} {v.target.mask_ratio!r}" for v in here
    ]
    assert done.stdout.split("\n")[:-1] == expected


@pytest.mark.parametrize("sampler", [fixed_ratio_views(), uniform_ratio_views()], ids=["fixed", "uniform"])
def test_seed_epoch_and_index_each_change_the_draw(sampler: ViewSampler) -> None:
    """All draws of a grid differ, in both views: (1, 2) is not (2, 1) either. Low ratios may mask alike."""
    grid = [draw(sampler, seed=s, epoch=e, index=i) for s, e, i in itertools.product(range(5), repeat=3)]
    grid += [draw(sampler, seed=2**63), draw(sampler, index=2**40), draw(sampler, epoch=2**40)]
    for view in ("context", "target"):
        drawn = [getattr(views, view) for views in grid]
        assert len({(one.masked.tobytes(), one.mask_ratio) for one in drawn}) == len(grid)


@pytest.mark.parametrize("step", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["seed", "epoch", "index"])
def test_neighbouring_draws_are_independent(step: tuple[int, int, int]) -> None:
    """Sequence i masked and its neighbour masked, at the same place: the product of the rates."""
    sampler, num_sequences, length = fixed_ratio_views(context_ratio=0.4), 300, 64
    chain = [
        draw(sampler, length, seed=step[0] * n, epoch=step[1] * n, index=step[2] * n).context.masked
        for n in range(num_sequences)
    ]
    both = np.mean([first & second for first, second in itertools.pairwise(chain)])
    assert abs(both - 0.16) < SIGMAS * standard_deviation_of_rate(0.16, (num_sequences - 1) * length)


@pytest.mark.parametrize(("context_ratio", "target_ratio"), [(0.2, 0.7), (0.1, 0.9), (0.45, 0.5)])
@pytest.mark.parametrize("nested", [False, True])
def test_every_maskable_token_is_masked_at_the_ratio(context_ratio: float, target_ratio: float, nested: bool) -> None:
    sampler = fixed_ratio_views(context_ratio=context_ratio, target_ratio=target_ratio, nested=nested)
    num_sequences, length = 400, 120
    maskable = np.arange(length) >= 20
    drawn = [draw(sampler, length, maskable, index=index) for index in range(num_sequences)]
    for ratio, view in ((context_ratio, "context"), (target_ratio, "target")):
        masked = np.stack([getattr(views, view).masked for views in drawn])[:, 20:]  # [sequences, maskable]
        assert abs(masked.mean() - ratio) < SIGMAS * standard_deviation_of_rate(ratio, masked.size)
        per_position = np.abs(masked.mean(0) - ratio)
        assert per_position.max() < SIGMAS * standard_deviation_of_rate(ratio, num_sequences)
        # A Bernoulli draw, not a fixed count: the number of masked tokens is binomial.
        variance = masked.sum(1).var(ddof=1)
        assert abs(variance / (100 * ratio * (1 - ratio)) - 1) < SIGMAS * math.sqrt(2 / (num_sequences - 1))
        assert {getattr(views, view).mask_ratio for views in drawn} == {ratio}


@pytest.mark.parametrize("ratio", [0.001, 0.2, 0.5, 0.7, 0.999])
@pytest.mark.parametrize("nested", [False, True])
def test_exact_count_masks_the_rounded_number(ratio: float, nested: bool) -> None:
    context = fixed_ratio_views(context_ratio=ratio, target_ratio=0.9995, exact_count=True, nested=nested)
    target = fixed_ratio_views(context_ratio=0.0005, target_ratio=ratio, exact_count=True, nested=nested)
    for num_maskable in range(1, 60):
        maskable = np.arange(num_maskable + 1) > 0
        for index in range(3):
            counts = (
                int(draw(context, num_maskable + 1, maskable, index=index).context.masked.sum()),
                int(draw(target, num_maskable + 1, maskable, index=index).target.masked.sum()),
            )
            for count in counts:
                assert abs(count - ratio * num_maskable) <= 0.5 or count == 1 > ratio * num_maskable


def test_exact_count_favours_no_position() -> None:
    sampler, num_sequences, length = fixed_ratio_views(exact_count=True), 500, 20
    masked = np.stack([draw(sampler, length, index=index).context.masked for index in range(num_sequences)])
    assert set(masked.sum(1)) == {4}
    assert np.abs(masked.mean(0) - 0.2).max() < SIGMAS * standard_deviation_of_rate(0.2, num_sequences)


@pytest.mark.parametrize(
    "sampler",
    [
        fixed_ratio_views(nested=True),
        fixed_ratio_views(nested=True, exact_count=True),
        fixed_ratio_views(context_ratio=0.001, target_ratio=0.002, nested=True),
        fixed_ratio_views(context_ratio=0.998, target_ratio=0.999, nested=True),
        uniform_ratio_views(nested=True),
        uniform_ratio_views(nested=True, exact_count=True),
        uniform_ratio_views(nested=True, target_gap=0.05),
    ],
)
def test_nested_target_contains_the_context(sampler: ViewSampler) -> None:
    for length in range(2, 30):
        for index in range(20):
            views = draw(sampler, length, index=index)
            assert not (views.context.masked & ~views.target.masked).any()


@pytest.mark.parametrize("exact_count", [False, True])
def test_views_are_independent_unless_nested(exact_count: bool) -> None:
    """Masked in both: the product of the ratios when independent, the context's ratio when nested."""
    num_sequences, length = 400, 100
    for nested, expected in ((False, 0.3 * 0.6), (True, 0.3)):
        sampler = fixed_ratio_views(context_ratio=0.3, target_ratio=0.6, exact_count=exact_count, nested=nested)
        drawn = [draw(sampler, length, index=index) for index in range(num_sequences)]
        both = np.mean([views.context.masked & views.target.masked for views in drawn])
        assert abs(both - expected) < SIGMAS * standard_deviation_of_rate(expected, num_sequences * length)


@pytest.mark.parametrize("exact_count", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("ratios", [(1e-6, 2e-6), (0.2, 0.7), (1 - 2e-6, 1 - 1e-6)], ids=["low", "paper", "high"])
def test_every_view_masks_one_token_and_leaves_one(
    exact_count: bool, nested: bool, ratios: tuple[float, float]
) -> None:
    """Every length from 2 to 6 and every set of maskable positions; nothing else is ever touched."""
    sampler = fixed_ratio_views(context_ratio=ratios[0], target_ratio=ratios[1], exact_count=exact_count, nested=nested)
    for length in range(2, 7):
        tokens = np.arange(length, dtype=np.int64)
        for bits in range(1, 2**length):
            maskable = np.array([bool(bits >> position & 1) for position in range(length)])
            views = draw(sampler, length, maskable, seed=bits)
            for view in (views.context, views.target):
                assert view.masked.shape == (length,) and 1 <= view.masked.sum() < length
                assert not (view.masked & ~maskable).any()
                assert np.array_equal(view.tokens, np.where(view.masked, MASK_ID, tokens))
                assert view.tokens.dtype == np.int64


def test_the_forced_token_is_any_of_the_maskable_ones() -> None:
    """At a ratio near 0 the one masked token, near 1 the one visible token, is uniform over the positions."""
    num_sequences, length = 600, 6
    sampler = fixed_ratio_views(context_ratio=1e-6, target_ratio=1 - 1e-6)
    drawn = [draw(sampler, length, index=index) for index in range(num_sequences)]
    for chosen in (
        np.stack([views.context.masked for views in drawn]),
        np.stack([~views.target.masked for views in drawn]),
    ):
        assert set(chosen.sum(1)) == {1}
        rates = np.abs(chosen.mean(0) - 1 / length)
        assert rates.max() < SIGMAS * standard_deviation_of_rate(1 / length, num_sequences)


def test_the_clean_sequence_is_left_alone() -> None:
    tokens, maskable = np.arange(9, dtype=np.int64), np.arange(9) > 2
    fixed_ratio_views()(tokens, maskable, mask_id=MASK_ID, seed=0, epoch=0, index=0)
    assert np.array_equal(tokens, np.arange(9)) and np.array_equal(maskable, np.arange(9) > 2)


def is_uniform(values: npt.NDArray[np.float64]) -> bool:
    """Mean, variance and quartile counts of U(0, 1), each within its own standard deviation."""
    count = len(values)
    quartiles = np.histogram(values, bins=4, range=(0, 1))[0] / count
    return bool(
        values.min() >= 0
        and values.max() <= 1
        and abs(values.mean() - 0.5) < SIGMAS * math.sqrt(1 / 12 / count)
        and abs(values.var() - 1 / 12) < SIGMAS * math.sqrt(1 / 180 / count)
        and np.abs(quartiles - 0.25).max() < SIGMAS * standard_deviation_of_rate(0.25, count)
    )


@pytest.mark.parametrize(
    ("context_range", "target_range"),
    [((0.0, 1.0), None), ((0.1, 0.4), (0.5, 0.9)), ((0.2, 0.6), (0.3, 0.6)), ((0.3, 0.3), (0.7, 0.7))],
)
def test_uniform_ratios(context_range: tuple[float, float], target_range: tuple[float, float] | None) -> None:
    sampler = uniform_ratio_views(context_range=context_range, target_range=target_range)
    drawn = [draw(sampler, 2, index=index) for index in range(2000)]
    context = np.array([views.context.mask_ratio for views in drawn])
    target = np.array([views.target.mask_ratio for views in drawn])
    assert (0 < context).all() and (context < target).all() and (target <= 1).all()
    low, high = context_range
    if low < high:
        assert is_uniform((context - low) / (high - low))
    else:
        assert (context == low).all()
    low, high = (0.0, 1.0) if target_range is None else target_range
    if low < high:
        lows = np.maximum(low, context)
        share = (target - lows) / (high - lows)
        assert is_uniform(share)
        assert abs(np.corrcoef(context, share)[0, 1]) < SIGMAS / math.sqrt(len(drawn))
    else:
        assert (target == low).all()


def test_target_gap() -> None:
    drawn = [draw(uniform_ratio_views(target_gap=0.3), 2, index=index) for index in range(500)]
    for views in drawn:
        assert views.target.mask_ratio == pytest.approx(min(views.context.mask_ratio + 0.3, 1))
    assert {views.target.mask_ratio == 1 for views in drawn} == {False, True}


def test_a_drawn_ratio_is_bounded_away_from_zero() -> None:
    """1/t weights stay finite, though the range reaches down to 0; the target is above all the same."""
    sampler = uniform_ratio_views(context_range=(0.0, 1e-9))
    for index in range(50):
        views = draw(sampler, 8, index=index)
        assert 1e-4 <= views.context.mask_ratio <= 1e-2
        assert views.target.mask_ratio > views.context.mask_ratio


@pytest.mark.parametrize("view", ["context", "target"])
def test_uniform_views_mask_at_the_ratio_they_report(view: str) -> None:
    sampler, length = uniform_ratio_views(), 200
    surplus = variance = 0.0
    for index in range(300):
        drawn = getattr(draw(sampler, length, index=index), view)
        surplus += drawn.masked.sum() - length * drawn.mask_ratio
        variance += length * drawn.mask_ratio * (1 - drawn.mask_ratio)
        distance = abs(drawn.masked.sum() - length * drawn.mask_ratio)
        assert distance < 1 + SIGMAS * math.sqrt(length * drawn.mask_ratio * (1 - drawn.mask_ratio))
    assert abs(surplus) < SIGMAS * math.sqrt(variance)


def test_ranges_may_be_yaml_lists() -> None:
    listed = uniform_ratio_views(context_range=[0.1, 0.2], target_range=[0.6, 0.8])
    paired = uniform_ratio_views(context_range=(0.1, 0.2), target_range=(0.6, 0.8))
    assert fingerprint(draw(listed)) == fingerprint(draw(paired))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context_ratio": 0.0}, r"context_ratio must be in \(0, 1\), got 0.0"),
        ({"context_ratio": -0.1}, r"context_ratio must be in \(0, 1\), got -0.1"),
        ({"target_ratio": 1.0}, r"target_ratio must be in \(0, 1\), got 1.0"),
        ({"target_ratio": math.nan}, r"target_ratio must be in \(0, 1\), got nan"),
        ({"context_ratio": 0.7}, r"context_ratio \(0.7\) must be below target_ratio \(0.7\)"),
        ({"context_ratio": 0.8, "target_ratio": 0.3}, r"context_ratio \(0.8\) must be below target_ratio \(0.3\)"),
    ],
)
def test_fixed_ratios_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fixed_ratio_views(**arguments)


@pytest.mark.parametrize(
    ("context_range", "target_range", "target_gap", "message"),
    [
        ((0.0, 1.0), (0.0, 1.0), 0.1, "target_range and target_gap exclude each other"),
        ((0.1, 0.2, 0.3), None, None, r"context_range must be \[low, high\], got \[0.1, 0.2, 0.3\]"),
        ((-0.1, 0.5), None, None, r"ends of context_range must be in \[0, 1\], got \[-0.1, 0.5\]"),
        ((0.0, 0.5), (0.5, 1.1), None, r"ends of target_range must be in \[0, 1\], got \[0.5, 1.1\]"),
        ((math.nan, 0.5), None, None, r"ends of context_range must be in \[0, 1\]"),
        ((0.5, 0.4), None, None, r"context_range must be \[low, high\] with low <= high"),
        ((0.0, 0.0), None, None, r"context_range must be \[low, high\] with low <= high and high > 0"),
        ((0.0, 0.9), (0.2, 0.8), None, r"target_range must reach at least as high as context_range \(0.9\)"),
        ((0.0, 1.0), None, 0.0, r"target_gap must be in \(0, 1\), got 0.0"),
        ((0.0, 1.0), None, 1.0, r"target_gap must be in \(0, 1\), got 1.0"),
        ((0.5, 0.5), (0.2, 0.5), None, "no target ratio lies above the context's"),
        ((1.0, 1.0), None, 0.1, "no target ratio lies above the context's"),
        ((1.0, 1.0), None, None, "no target ratio lies above the context's"),
        ((0.0, 0.0004), (0.0, 0.0005), None, "no target ratio lies above the context's"),
    ],
)
def test_ranges_are_checked(
    context_range: tuple[float, float],
    target_range: tuple[float, float] | None,
    target_gap: float | None,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        uniform_ratio_views(context_range=context_range, target_range=target_range, target_gap=target_gap)


@pytest.mark.parametrize(
    ("length", "num_maskable"), [(1, 1), (5, 0), (1, 0)], ids=["nothing beside it", "nothing maskable", "neither"]
)
def test_a_sequence_without_a_view_is_refused(length: int, num_maskable: int) -> None:
    maskable = np.arange(length) < num_maskable
    with pytest.raises(ValueError, match=rf"sample 17: .* got {length} tokens of which {num_maskable} maskable"):
        draw(fixed_ratio_views(), length, maskable, index=17)
