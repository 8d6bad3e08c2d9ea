"""Errors that are shown to the user as one message, without a traceback, and how messages name values."""

import difflib
import json
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """Something the user can mend: the message names the key or file, the value, what is allowed and what to do."""


class ConfigError(UserError):
    """A config that cannot be run; the message lists every problem found."""


class DataError(UserError):
    """A dataset file or row that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint directory that cannot be read, written or resumed from."""


class LaunchError(UserError):
    """A launch that does not fit the machine or the output directory."""


class LostRankError(LaunchError):
    """Another rank has ended; whoever notices says so at once."""


class TrainingError(UserError):
    """A run that cannot go on, such as one whose loss is no longer finite."""


def shown(value: object) -> str:
    """Write a value in yaml's words (null, true, "text"), in one line of at most 60 characters."""
    text = json.dumps(value, default=repr, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def nearest_first(word: str, names: Iterable[str]) -> list[str]:
    """The names, sorted by likeness to `word`, the most alike first."""
    stem = Path(word).stem
    return sorted(names, key=lambda name: -difflib.SequenceMatcher(None, stem, name).ratio())


def suggestion(word: str, names: Iterable[str]) -> str:
    """` Did you mean x?` for the name nearest to `word`, or nothing if none is near."""
    matches = difflib.get_close_matches(word, list(names), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]}?" if matches else ""
