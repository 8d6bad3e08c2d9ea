"""Facts: hashes, settings as JSON, and what differs."""

import hashlib
import json
from dataclasses import dataclass

from dllm_jepa.evals._results import differences
from dllm_jepa.evals._task import described, sha256_of


@dataclass(frozen=True)
class Even:
    steps: int


@dataclass(frozen=True)
class Noise:
    steps: int


@dataclass(frozen=True)
class Settings:
    length: int
    schedule: Even | Noise
    cache: str | None = None


def test_kinds_with_the_same_fields_are_told_apart() -> None:
    even, noise = described(Settings(8, Even(4))), described(Settings(8, Noise(4)))
    assert even == {"kind": "Settings", "length": 8, "schedule": {"kind": "Even", "steps": 4}, "cache": None}
    assert json.loads(json.dumps(even)) == even != noise
    assert differences(even, noise) == {"schedule.kind": ("Even", "Noise")}


def test_hash_of_values_in_their_order() -> None:
    assert sha256_of([["a\n", 1], "b"]) == hashlib.sha256(b'["a\\n", 1]\n"b"\n').hexdigest()
    groups = [[["a", "b"]], [["a"], ["b"]], ["a", "b"], ["ab"], ["b", "a"], []]
    assert len({sha256_of(group) for group in groups}) == len(groups)
    assert sha256_of([{"a": 1, "b": 2}]) == sha256_of([{"b": 2, "a": 1}])
