"""What tells one evaluation from another: hashes of its data, its settings, and the differences of two."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def sha256_of(values: Iterable[Any]) -> str:
    """A hash of JSON values in their order.

    Args:
        values: such as the rows of a dataset.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for value in values:
        # No JSON value has a line feed outside of quotes, where it is written as an escape.
        digest.update(json.dumps(value, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def described(value: object) -> Any:
    """Settings as JSON values.

    Args:
        value: a dataclass, of which the fields may be dataclasses, or a JSON value.

    Returns:
        An object with the fields of the dataclass and, as `kind`, the name of its class, since two kinds may have the
        same fields; or the value itself.
    """
    if not is_dataclass(value):
        return value
    return {"kind": type(value).__name__} | {
        field.name: described(getattr(value, field.name)) for field in fields(value)
    }


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """What differs between two sets of facts.

    Args:
        a: JSON values by name.
        b: the same of another evaluation.
        prefix: stands in front of every name.

    Returns:
        Both values by dotted name, None for one that is missing.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*a, *b]):
        of_a, of_b = a.get(key), b.get(key)
        if isinstance(of_a, dict) and isinstance(of_b, dict):
            found |= differences(of_a, of_b, f"{prefix}{key}.")
        elif of_a != of_b:
            found[f"{prefix}{key}"] = (of_a, of_b)
    return found
