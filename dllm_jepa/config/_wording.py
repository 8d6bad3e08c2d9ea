"""How messages name values and near misses."""

import difflib
import json
from collections.abc import Iterable
from pathlib import Path


def shown(value: object) -> str:
    """Write a value in yaml's words (null, true, "text"), in one line of at most 60 characters."""
    text = json.dumps(value, default=repr, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def nearest_first(word: str, names: Iterable[str]) -> list[str]:
    """Return `names` sorted by likeness to `word`, the most alike first."""
    stem = Path(word).stem
    return sorted(names, key=lambda name: -difflib.SequenceMatcher(None, stem, name).ratio())


def suggestion(word: str, names: Iterable[str]) -> str:
    """Return ` Did you mean x?` for the name nearest to `word`, or nothing if none is near."""
    matches = difflib.get_close_matches(word, list(names), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]}?" if matches else ""
