r"""Syntax trees of the built-in (description, regex) pairs, their regex text, and the rule that keeps them meaningful.

A line is one clause, its complement, or two clauses joined; a clause holds one or two items; an item is a unit, a
repeated unit, or a choice of two units. Nothing nests deeper, so every construct can have words of its own.

The dialect is that of NL-RX: `|` binds weakest, then `&` (intersection), concatenation, the postfix `+ {n} {n,}` and
last the prefix `~` (complement); `\b` is a zero-width word boundary.

No language is empty or all-accepting, by construction:
- every item needs at least one character, so a clause accepts some line and rejects the empty one; its complement the
  other way round; and the union of two clauses like a clause;
- two clauses are joined only when `may_join` finds, for each of them, a line that it accepts and the other one
  rejects: then A & ~B is not empty, and neither A & B nor A | B is just A or B again;
- of two joined clauses at most one fixes the start and at most one the end, and none fixes the whole line, so a line
  of both is found by putting their texts side by side, with a gap between them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

ClauseKind = Literal["contains", "starts", "ends", "sequence", "adjacent", "whole_word", "only"]
LineKind = Literal["plain", "not", "and", "or", "but_not", "neither"]


@dataclass(frozen=True)
class Unit:
    """A character class or a fixed word.

    Args:
        regex: its regex piece.
        phrase: its English name with article, `a number` or `the string dog`.
        members: characters of the class; "" for a fixed word.
        samples: two texts that the unit matches, as different as possible: witnesses are built from them.
    """

    regex: str
    phrase: str
    members: str
    samples: tuple[str, str]

    @property
    def is_word(self) -> bool:
        """Whether this is a fixed word, which needs parentheses under a repeat."""
        return not self.members

    def text(self, *, canonical: bool = False) -> str:
        """The regex piece; `canonical` spells out the members of a class, which may have several names."""
        return f"[{''.join(sorted(self.members))}]" if canonical and self.members else self.regex

    def occurs(self, text: str, times: int) -> bool:
        """Whether `text` has a match of `times` units in a row."""
        if self.is_word:
            return self.regex * times in text
        run = longest = 0
        for character in text:
            run = run + 1 if character in self.members else 0
            longest = max(longest, run)
        return longest >= times


@dataclass(frozen=True)
class Item:
    """One unit (`repeat` 0), a unit at least or exactly `repeat` times, or a choice of two units.

    Args:
        unit: the unit, or the first of a choice.
        other: the second unit of a choice; None otherwise.
        repeat: times the unit is repeated, 1 or more; 0 for no repeat. A choice is never repeated.
        exactly: exactly `repeat` times instead of at least.
    """

    unit: Unit
    other: Unit | None = None
    repeat: int = 0
    exactly: bool = False

    def regex(self, *, canonical: bool = False) -> str:
        """The regex of the item; `canonical` sorts the two units of a choice."""
        text = self.unit.text(canonical=canonical)
        if self.other is not None:
            options = [text, self.other.text(canonical=canonical)]
            return f"({'|'.join(sorted(options) if canonical else options)})"
        if self.repeat == 0:
            return text
        base = f"({text})" if self.unit.is_word else text
        if self.exactly:
            return f"{base}{{{self.repeat}}}"
        return f"{base}+" if self.repeat == 1 else f"{base}{{{self.repeat},}}"

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units of a choice, or the only one."""
        return (self.unit,) if self.other is None else (self.unit, self.other)

    def samples(self, variant: int) -> list[str]:
        """Short texts that the item matches, one for each unit; `variant` 0 or 1 picks the sample of the units."""
        return [unit.samples[variant] * max(1, self.repeat) for unit in self.units]

    def occurs(self, text: str) -> bool:
        """Whether the item matches a part of `text`."""
        return any(unit.occurs(text, max(1, self.repeat)) for unit in self.units)


@dataclass(frozen=True)
class Clause:
    """A condition on a whole line: where its items have to be, two for `sequence` and `adjacent`, one otherwise."""

    kind: ClauseKind
    items: tuple[Item, ...]

    def regex(self, *, canonical: bool = False) -> str:
        """The regex of the clause, which matches whole lines."""
        return _CLAUSE_REGEX[self.kind](*[item.regex(canonical=canonical) for item in self.items])


_CLAUSE_REGEX: dict[ClauseKind, Callable[..., str]] = {
    "contains": lambda item: f".*{item}.*",
    "starts": lambda item: f"{item}.*",
    "ends": lambda item: f".*{item}",
    "sequence": lambda first, second: f".*{first}.*{second}.*",
    "adjacent": lambda first, second: f".*{first}{second}.*",
    "whole_word": lambda item: f".*\\b{item}\\b.*",
    "only": lambda item: item,
}

_LINE_REGEX: dict[LineKind, Callable[..., str]] = {
    "plain": lambda clause: clause,
    "not": lambda clause: f"~({clause})",
    "and": lambda first, second: f"({first})&({second})",
    "or": lambda first, second: f"({first})|({second})",
    "but_not": lambda first, second: f"({first})&~({second})",
    "neither": lambda first, second: f"~(({first})|({second}))",
}


@dataclass(frozen=True)
class Line:
    """The root of a tree: one clause for `plain` and `not`, two otherwise."""

    kind: LineKind
    clauses: tuple[Clause, ...]

    def regex(self, *, canonical: bool = False) -> str:
        """The regex of the line.

        With `canonical`, lines that differ in the order of the operands of `|` and `&` or in the name of a class have
        one text. It is no regex to train on.
        """
        texts = [clause.regex(canonical=canonical) for clause in self.clauses]
        if canonical and self.kind != "but_not":
            texts.sort()
        return _LINE_REGEX[self.kind](*texts)


def may_join(kind: LineKind, first: Clause, second: Clause) -> bool:
    """Whether two clauses with one item each may be joined; sound but cautious.

    Each must accept lines that the other one rejects, for every unit of a choice of its own, and one line must satisfy
    both. A union of two clauses that differ only in their item is refused too: a choice already says that.
    """
    kinds = (first.kind, second.kind)
    if "only" in kinds or kinds in (("starts", "starts"), ("ends", "ends")):
        return False
    if kind in ("or", "neither") and first.kind == second.kind:
        return False
    return _escapes(first, second) and _escapes(second, first)


def _escapes(clause: Clause, other: Clause) -> bool:
    """Whether every unit that satisfies `clause` can do so without what every line of `other` has."""
    (item,), (needed,) = clause.items, other.items
    texts = zip(item.samples(0), item.samples(1), strict=True)
    return all(not needed.occurs(text) or not needed.occurs(variant) for text, variant in texts)
