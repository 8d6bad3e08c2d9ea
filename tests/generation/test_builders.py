"""The arguments of the builders: every one that is out of range is named with its value and what is allowed."""

import dataclasses
import inspect
import json
from typing import Any

import pytest

from dllm_jepa.generation import Decoding, EvenSpread, NoiseLevels, Sampling, dream_decoding, llada_decoding

LLADA = {"gen_length": 16, "block_length": 8, "steps": 8}
DREAM = {"gen_length": 16, "steps": 8, "algorithm": "maskgit_plus"}

BOTH = [
    ({"gen_length": 0}, "gen_length must be at least 1, got 0"),
    ({"block_length": 17}, r"block_length must be between 1 and gen_length \(16\), got 17"),
    ({"block_length": 6, "steps": 8}, r"steps must be a multiple of the number of blocks \(3\), got 8"),
    ({"steps": 0}, r"steps must be a multiple of the number of blocks \(\d\), got 0"),
    ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
    ({"temperature": 1.0, "top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
    ({"temperature": 1.0, "top_k": 0}, "top_k must be at least 1, got 0"),
    ({"threshold": 0.0}, r"threshold must be in \(0, 1\], got 0.0"),
    ({"factor": 0.0}, "factor must be above 0, got 0.0"),
    ({"threshold": 0.9, "factor": 1.0}, "threshold and factor exclude each other, got 0.9 and 1.0"),
    ({"cache": "full"}, "cache must be one of none, prefix, dual, got 'full'"),
    ({"cache_refresh": 4}, "cache_refresh=4 needs a cache: cache must be prefix or dual, got 'none'"),
    ({"cache": "dual", "cache_refresh": 0}, "cache_refresh must be at least 1, or None, got 0"),
]
LLADA_ONLY = [
    ({"remasking": "high"}, "remasking must be one of low_confidence, random, got 'high'"),
    ({"cfg_scale": -1.0}, "cfg_scale must be at least 0, got -1.0"),
    ({"cfg_scale": 2.0, "cache": "dual"}, "cfg_scale=2.0 goes with cache='none' only, got 'dual'"),
    ({"top_p": 0.9}, "top_p must be None at temperature 0, which takes the likeliest token, got 0.9"),
    ({"top_k": 5}, "top_k must be None at temperature 0"),
    (
        {"remasking": "random", "threshold": 0.9},
        r"threshold=0.9 needs confidences in \[0, 1\]: remasking must be low_confidence, got 'random'",
    ),
]
DREAM_ONLY = [
    ({"algorithm": "maskgit"}, "algorithm must be one of origin, maskgit_plus, topk_margin, entropy, got 'maskgit'"),
    ({"eps": 0.0}, r"eps must be in \(0, 1\), got 0.0"),
    ({"alg_temp": -1.0}, "alg_temp must be at least 0, got -1.0"),
    ({"algorithm": "origin", "alg_temp": 0.1}, "alg_temp must be None or 0 with algorithm 'origin', got 0.1"),
    ({"threshold": 0.9, "alg_temp": 0.1}, "alg_temp must be None or 0 with threshold or factor, got 0.1"),
    (
        {"algorithm": "entropy", "factor": 1.0},
        r"factor=1.0 needs confidences in \[0, 1\]: algorithm must be maskgit_plus or topk_margin, got 'entropy'",
    ),
]


@pytest.mark.parametrize(("change", "message"), BOTH + LLADA_ONLY)
def test_llada_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llada_decoding(**LLADA | change)


@pytest.mark.parametrize(("change", "message"), BOTH + DREAM_ONLY)
def test_dream_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dream_decoding(**DREAM | change)


def test_parts_refuse_what_no_builder_gives_them() -> None:
    with pytest.raises(ValueError, match="confidence must be one of probability, margin, .*, got 'luck'"):
        Decoding(4, 4, EvenSpread(4), Sampling(), "luck")
    with pytest.raises(ValueError, match="steps must be at least 1 for every block, got 0"):
        EvenSpread(0)
    with pytest.raises(ValueError, match="steps must be at least 1 for every block, got 0"):
        NoiseLevels(0)


def test_defaults_are_the_published_ones() -> None:
    assert llada_decoding(**LLADA) == Decoding(16, 8, EvenSpread(4), Sampling(), "probability")
    origin = Decoding(16, 16, NoiseLevels(8, 1e-3, True), Sampling(sharpen_confidence=True), "random")
    assert dream_decoding(gen_length=16, steps=8) == origin
    assert dream_decoding(**DREAM, alg_temp=0) == dream_decoding(**DREAM, alg_temp=None, block_length=16)


@pytest.mark.parametrize("decoding", [llada_decoding(**LLADA), dream_decoding(**DREAM)], ids=["llada", "dream"])
def test_whether_results_are_random(decoding: Decoding) -> None:
    assert not decoding.is_random
    for change in ({"sampling": Sampling(0.5)}, {"alg_temp": 0.5}, {"confidence": "random"}):
        assert dataclasses.replace(decoding, **change).is_random
    assert dataclasses.replace(decoding, schedule=NoiseLevels(4, independently=True)).is_random


def test_every_argument_shows_in_the_settings() -> None:
    """Evaluations compare these; two decodings that differ must not look the same."""
    change = {
        **{"gen_length": 32, "block_length": 4, "steps": 16, "temperature": 1.0, "cfg_scale": 1.0, "cache": "prefix"},
        **{"remasking": "random", "threshold": 0.9, "factor": 1.0, "algorithm": "entropy", "alg_temp": 0.5, "eps": 0.1},
    }
    together = {"top_p": {"temperature": 1.0}, "top_k": {"temperature": 1.0}, "cache_refresh": {"cache": "dual"}}
    change |= {"top_p": 0.5, "top_k": 5, "cache_refresh": 3}
    for builder, base in ((llada_decoding, LLADA), (dream_decoding, DREAM)):
        for name in inspect.signature(builder).parameters:
            base_here = base | together.get(name, {})
            before, after = builder(**base_here), builder(**base_here | {name: change[name]})
            assert json.dumps(dataclasses.asdict(before)) != json.dumps(dataclasses.asdict(after)), name
