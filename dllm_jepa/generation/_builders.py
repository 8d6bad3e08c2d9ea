"""The samplers of the two families, by their published settings."""

from collections.abc import Mapping
from typing import Literal, cast, get_args

from dllm_jepa.generation._decoding import Decoding, count_blocks
from dllm_jepa.generation._sampling import Sampling
from dllm_jepa.generation._schedules import EvenSpread, Factor, NoiseLevels, SpeedUp, Threshold
from dllm_jepa.generation._scoring import Cache

Remasking = Literal["low_confidence", "random"]
Algorithm = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]

# Published name: key of `CONFIDENCES`.
_REMASKING: Mapping[str, str] = {"low_confidence": "probability", "random": "random"}
_ALGORITHMS: Mapping[str, str] = {
    "origin": "random",
    "maskgit_plus": "probability",
    "topk_margin": "margin",
    "entropy": "negative_entropy",
}


def llada_decoding(
    *,
    gen_length: int,
    block_length: int,
    steps: int,
    temperature: float = 0.0,
    remasking: Remasking = "low_confidence",
    top_p: float | None = None,
    top_k: int | None = None,
    cfg_scale: float = 0.0,
    cache: Cache = "none",
    cache_refresh: int | None = None,
    threshold: float | None = None,
    factor: float | None = None,
) -> Decoding:
    """LLaDA's sampler: the tokens of a block are spread evenly over its steps, those of the highest probability first.

    Args:
        gen_length: tokens to generate per prompt.
        block_length: tokens of a block, in [1, `gen_length`]; blocks are filled from left to right, the last one may
            be shorter.
        steps: forward passes over all blocks at most, a multiple of the number of blocks.
        temperature: at least 0; 0 takes the likeliest token. The confidence is that of the model without it.
        remasking: `low_confidence` commits the tokens of the highest probability first, `random` any.
        top_p: sample from the fewest tokens with more than this probability together, in (0, 1]; needs a temperature.
        top_k: sample from as many tokens; needs a temperature.
        cfg_scale: scale of classifier-free guidance, at least 0; doubles the work. Not with a cache.
        cache: `none` is exact; `prefix` and `dual` are faster approximations, see `Decoding`.
        cache_refresh: compute all keys and values anew every so many steps of a block, not just at its start.
        threshold: also commit all tokens of at least this probability, in (0, 1], and at least one a step.
        factor: also commit the n surest tokens, for the largest n with (n + 1) * (1 - probability) < factor, and at
            least one a step; above 0.

    Raises:
        ValueError: an argument is out of range, or two do not go together.

    Source: ML-GSAI/LLaDA, generate.py, `generate` (Nie et al. 2025, "Large Language Diffusion Models", algorithm 5).
    """
    _check_name("remasking", remasking, get_args(Remasking))
    for name, value in (("top_p", top_p), ("top_k", top_k)):
        if value is not None and temperature == 0:
            raise ValueError(f"{name} must be None at temperature 0, which takes the likeliest token, got {value}")
    return Decoding(
        gen_length,
        block_length,
        EvenSpread(_steps_per_block(gen_length, block_length, steps)),
        Sampling(temperature, top_p, top_k),
        _REMASKING[remasking],
        speed_up=_speed_up(threshold, factor, "remasking", remasking, ("low_confidence",)),
        cache=cache,
        cache_refresh=cache_refresh,
        cfg_scale=cfg_scale,
    )


def dream_decoding(
    *,
    gen_length: int,
    steps: int,
    algorithm: Algorithm = "origin",
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    alg_temp: float | None = None,
    eps: float = 1e-3,
    block_length: int | None = None,
    cache: Cache = "none",
    cache_refresh: int | None = None,
    threshold: float | None = None,
    factor: float | None = None,
) -> Decoding:
    """Dream's sampler: each step commits the tokens between two noise levels, counted in every row by itself.

    Args:
        gen_length: tokens to generate per prompt.
        steps: steps over all blocks, a multiple of their number; those that commit nothing cost no forward pass.
        algorithm: `origin` commits tokens by chance; the others those of the highest probability (`maskgit_plus`),
            distance to the second likeliest token (`topk_margin`) or negative entropy (`entropy`).
        temperature: at least 0; 0 takes the likeliest token. Confidences are measured after it, and after the cuts.
        top_p: cut to the fewest tokens with more than this probability together, in (0, 1].
        top_k: cut to as many tokens.
        alg_temp: draw the order from the softmax of the confidences divided by this; None or 0 takes the highest. Not
            with `origin`, nor with threshold or factor.
        eps: last noise level, in (0, 1).
        block_length: tokens of a block, in [1, `gen_length`]; None is one block, as published.
        cache: as in `llada_decoding`, with all arguments after it. It saves little without blocks.
        cache_refresh: compute all keys and values anew every so many steps of a block.
        threshold: as in `llada_decoding`; with `maskgit_plus` and `topk_margin`, whose confidences are in [0, 1].
        factor: as in `llada_decoding`; with the same two.

    Raises:
        ValueError: an argument is out of range, or two do not go together.

    Source: DreamLM/Dream, generation_utils.py, `_sample` (Ye et al. 2025, "Dream 7B", arXiv 2508.15487).
    """
    _check_name("algorithm", algorithm, get_args(Algorithm))
    speed_up = _speed_up(threshold, factor, "algorithm", algorithm, ("maskgit_plus", "topk_margin"))
    if alg_temp and (algorithm == "origin" or speed_up is not None):
        with_what = "algorithm 'origin'" if algorithm == "origin" else "threshold or factor"
        raise ValueError(f"alg_temp must be None or 0 with {with_what}, got {alg_temp}")
    block_length = gen_length if block_length is None else block_length
    return Decoding(
        gen_length,
        block_length,
        NoiseLevels(_steps_per_block(gen_length, block_length, steps), eps, independently=algorithm == "origin"),
        Sampling(temperature, top_p, top_k, sharpen_confidence=True),
        _ALGORITHMS[algorithm],
        alg_temp=alg_temp or 0.0,
        speed_up=speed_up,
        cache=cache,
        cache_refresh=cache_refresh,
    )


def _steps_per_block(gen_length: int, block_length: int, steps: int) -> int:
    num_blocks = count_blocks(gen_length, block_length)
    if steps < 1 or steps % num_blocks:
        raise ValueError(f"steps must be a multiple of the number of blocks ({num_blocks}), got {steps}")
    return steps // num_blocks


def _speed_up(
    threshold: float | None, factor: float | None, key: str, order: str, allowed: tuple[str, ...]
) -> SpeedUp | None:
    """The speed-up that was asked for, if the order of the tokens, given by the argument `key`, allows it."""
    if threshold is None and factor is None:
        return None
    if threshold is not None and factor is not None:
        raise ValueError(f"threshold and factor exclude each other, got {threshold} and {factor}: leave one out")
    if order not in allowed:
        given = f"factor={factor}" if threshold is None else f"threshold={threshold}"
        raise ValueError(f"{given} needs confidences in [0, 1]: {key} must be {' or '.join(allowed)}, got {order!r}")
    return Threshold(threshold) if threshold is not None else Factor(cast(float, factor))


def _check_name(key: str, name: str, allowed: tuple[str, ...]) -> None:
    if name not in allowed:
        raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {name!r}")
