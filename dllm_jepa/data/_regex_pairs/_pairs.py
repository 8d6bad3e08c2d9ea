"""The built-in generator of (description, regex) pairs: data for the demo that needs no download.

Descriptions are unambiguous: every construct has words of its own, a repeat or a choice can stand only where an item
can, and a clause only where a clause can, so each description has one reading and belongs to one regex. Several
descriptions may share a regex. See `_grammar` for the trees and for why no language is empty or all-accepting.
"""

import hashlib
import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from annotated_types import Ge, Le

from dllm_jepa.data._builders import join_builder
from dllm_jepa.data._examples import check_choice
from dllm_jepa.data._regex_pairs._grammar import Clause, ClauseKind, Item, Line, LineKind, Unit, may_join
from dllm_jepa.data._sources import Row
from dllm_jepa.data._tasks import TASKS, Examples, encode_examples

MAX_PAIRS = 100_000
_HELDOUT_EVERY = 10
# No word contains another one, nor does any two of them put side by side contain a third across the seam.
WORDS = ("dog", "truck", "ring", "lake", "bird", "stone", "chair", "moon", "fish", "house", "tree", "glass")

_Choice = TypeVar("_Choice")


@dataclass(frozen=True)
class Wording:
    """What one task talks about, and how.

    Args:
        word_phrase: English of a fixed word.
        choice: English of a choice of two units.
        repeats: English of a repeat: at least once, at least n times, exactly n times.
        clauses: English of every kind of clause; more than one wording each, with the same reading.
        clause_weights: how often a clause that stands alone is of a kind, relative to the others.
        joined_weights: the same for a clause that is joined with another one.
        line_weights: how often a line is of a kind, relative to the others.
    """

    classes: tuple[Unit, ...]
    word_phrase: str
    choice: str
    repeats: tuple[str, str, str]
    clauses: Mapping[ClauseKind, tuple[str, ...]]
    lines: Mapping[LineKind, tuple[str, ...]]
    clause_weights: Mapping[ClauseKind, int]
    joined_weights: Mapping[ClauseKind, int]
    line_weights: Mapping[LineKind, int]

    @property
    def words(self) -> tuple[Unit, ...]:
        """The shared word list under this task's phrase."""
        return tuple(Unit(word, self.word_phrase.format(word), "", (word, word)) for word in WORDS)


_CONSONANTS = "".join(letter for letter in string.ascii_lowercase if letter not in "aeiou")

_FIRST = Wording(
    classes=(
        Unit("[0-9]", "a number", string.digits, ("7", "0")),
        Unit("[A-Z]", "a capital letter", string.ascii_uppercase, ("Q", "E")),
        Unit("[a-z]", "a lower-case letter", string.ascii_lowercase, ("z", "e")),
        Unit("[A-Za-z]", "a letter", string.ascii_letters, ("z", "Q")),
        Unit("[AEIOUaeiou]", "a vowel", "AEIOUaeiou", ("e", "E")),
    ),
    word_phrase="the string {}",
    choice="either {} or {}",
    repeats=("{unit} once or more", "{unit} {times} or more times", "{unit} exactly {times} times"),
    clauses={
        "contains": ("containing {0}", "with {0}"),
        "starts": ("starting with {0}", "beginning with {0}"),
        "ends": ("ending with {0}", "finishing with {0}"),
        "sequence": ("containing {0} followed by {1}", "with {0} before {1}"),
        "adjacent": ("containing {0} directly followed by {1}", "with {0} right before {1}"),
        "only": ("made of {0}", "consisting of {0}"),
    },
    lines={
        "plain": ("lines {0}",),
        "not": ("lines not {0}",),
        "and": ("lines {0} and {1}",),
        "or": ("lines {0} or {1}",),
        "but_not": ("lines {0} but not {1}", "lines {0} and not {1}"),
    },
    clause_weights={"contains": 3, "starts": 3, "ends": 3, "sequence": 5, "adjacent": 4, "only": 2},
    joined_weights={"contains": 3, "starts": 3, "ends": 3},
    line_weights={"plain": 6, "not": 3, "and": 5, "or": 3, "but_not": 3},
)

_SECOND = Wording(
    classes=(
        Unit(r"\d", "a digit", string.digits, ("7", "0")),
        Unit(r"\s", "a blank", " \t", (" ", "\t")),
        Unit("[.,;:!?]", "a punctuation mark", ".,;:!?", (";", ".")),
        Unit("[b-df-hj-np-tv-z]", "a consonant", _CONSONANTS, ("k", "z")),
        Unit("[AEIOU]", "a capital vowel", "AEIOU", ("E", "A")),
    ),
    word_phrase="the text {}",
    choice="one of {} and {}",
    repeats=("one or more copies of {unit}", "{times} or more copies of {unit}", "exactly {times} copies of {unit}"),
    clauses={
        "contains": ("{0} occurs", "there is {0}"),
        "starts": ("{0} comes first",),
        "ends": ("{0} comes last",),
        "sequence": ("{0} occurs before {1}", "{1} occurs after {0}"),
        "adjacent": ("{0} comes right before {1}", "{1} comes right after {0}"),
        "whole_word": ("{0} occurs as a word", "there is {0} as a word"),
        "only": ("there is nothing but {0}",),
    },
    lines={
        "plain": ("rows where {0}",),
        "not": ("rows where it is false that {0}",),
        "and": ("rows where both {0} and {1}",),
        "but_not": ("rows where {0} unless {1}",),
        "neither": ("rows where neither {0} nor {1}",),
    },
    clause_weights={"contains": 3, "starts": 3, "ends": 3, "sequence": 5, "adjacent": 4, "whole_word": 2, "only": 2},
    joined_weights={"contains": 3, "starts": 3, "ends": 3, "whole_word": 2},
    line_weights={"plain": 6, "not": 3, "and": 5, "but_not": 3, "neither": 3},
)

WORDINGS: dict[str, Wording] = {"first": _FIRST, "second": _SECOND}


class _Sampler:
    """Draws trees and their English from one stream of random numbers.

    Only `Random.random` is used: Python keeps its sequence for a seed the same from version to version.
    """

    def __init__(self, wording: Wording, stream: str) -> None:
        self.wording = wording
        self.words = wording.words
        self.random = random.Random(stream)
        units = (*wording.classes, *self.words)
        self.clause_kinds = _expand(wording.clause_weights)
        self.joined_kinds = _expand(wording.joined_weights)
        self.line_kinds = _expand(wording.line_weights)
        self.choices = [(unit, other) for unit in units for other in units if _may_choose(unit, other, units)]

    def pick(self, options: Sequence[_Choice]) -> _Choice:
        """One of the options, all equally likely."""
        return options[int(self.random.random() * len(options))]

    def unit(self) -> Unit:
        return self.pick(self.wording.classes if self.random.random() < 0.5 else self.words)

    def item(self, clause_kind: ClauseKind) -> Item:
        if clause_kind == "whole_word":
            return Item(self.pick(self.words))
        if clause_kind == "only":
            # Exact counts make a difference only where nothing may stand beside them.
            exactly = self.random.random() < 0.3
            return Item(self.unit(), repeat=self.pick(range(2 if exactly else 1, 8)), exactly=exactly)
        form = self.random.random()
        if form < 0.55:
            return Item(self.unit())
        if form < 0.8:
            return Item(self.unit(), repeat=self.pick(range(2, 8)))
        return Item(*self.pick(self.choices))

    def clause(self, kinds: Sequence[ClauseKind]) -> Clause:
        kind = self.pick(kinds)
        if kind not in ("sequence", "adjacent"):
            return Clause(kind, (self.item(kind),))
        while True:
            first, second = self.item(kind), self.item(kind)
            # The same unit twice in a row would be a repeat under another name.
            if not set(first.units) & set(second.units):
                return Clause(kind, (first, second))

    def line(self) -> Line:
        kind = self.pick(self.line_kinds)
        if kind in ("plain", "not"):
            return Line(kind, (self.clause(self.clause_kinds),))
        while True:
            first, second = self.clause(self.joined_kinds), self.clause(self.joined_kinds)
            if may_join(kind, first, second):
                return Line(kind, (first, second))

    def describe(self, line: Line) -> str:
        """The English of a line, one of the wordings of each construct."""
        clauses = [
            self.pick(self.wording.clauses[clause.kind]).format(*map(self._item_phrase, clause.items))
            for clause in line.clauses
        ]
        return self.pick(self.wording.lines[line.kind]).format(*clauses)

    def _item_phrase(self, item: Item) -> str:
        if item.other is not None:
            return self.wording.choice.format(item.unit.phrase, item.other.phrase)
        if item.repeat == 0:
            return item.unit.phrase
        at_least_once, at_least, exactly = self.wording.repeats
        template = exactly if item.exactly else at_least_once if item.repeat == 1 else at_least
        return template.format(unit=item.unit.phrase, times=item.repeat)


def _expand(weights: Mapping[_Choice, int]) -> list[_Choice]:
    """Every key as often as its weight says."""
    return [option for option, weight in weights.items() for _ in range(weight)]


def _may_choose(unit: Unit, other: Unit, units: Sequence[Unit]) -> bool:
    """Whether a choice of the two is more than one of them, and no single unit under another name."""
    if any(all(one.occurs(sample, 1) for sample in two.samples) for one, two in ((unit, other), (other, unit))):
        return False
    together = {*unit.members, *other.members}
    return unit.is_word or other.is_word or all(together != {*third.members} for third in units)


def _is_heldout(line: Line) -> bool:
    """Whether the language belongs to the held-out set: a property of its text alone, whatever seed drew it."""
    digest = hashlib.blake2b(line.regex(canonical=True).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _HELDOUT_EVERY == 0


def generate_regex_pairs(
    *,
    num_pairs: int,
    seed: int,
    split: Literal["train", "heldout"],
    task: Literal["first", "second"] = "first",
) -> list[dict[str, str]]:
    """Generate distinct (description, regex) pairs; a pure function of its arguments.

    A longer list starts with the shorter one. The splits share no language text, not even with the operands of `|`
    and `&` swapped, for any sizes, seeds and tasks: about one language in ten is held out, by a hash of its text.

    Args:
        num_pairs: number of pairs, in [1, 100000].
        seed: seed of the draw.
        split: which languages to draw from.
        task: which classes and wordings; both share the word list.

    Returns:
        Dictionaries with the keys `description` and `regex`.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 1 <= num_pairs <= MAX_PAIRS:
        raise ValueError(f"num_pairs must be between 1 and {MAX_PAIRS}, got {num_pairs}")
    check_choice("split", split, ("train", "heldout"))
    check_choice("task", task, tuple(WORDINGS))
    sampler = _Sampler(WORDINGS[task], f"{task} {seed}")
    pairs: dict[str, str] = {}
    while len(pairs) < num_pairs:
        line = sampler.line()
        description = sampler.describe(line)
        if _is_heldout(line) == (split == "heldout"):
            pairs[description] = line.regex()
    return [{"description": description, "regex": regex} for description, regex in pairs.items()]


def _generated_examples(
    *,
    num_pairs: Annotated[int, Ge(1), Le(MAX_PAIRS)],
    seed: int = 0,
    split: Literal["train", "heldout"] = "train",
    task: Literal["first", "second"] = "first",
    max_rows: Annotated[int, Ge(1)] | None = None,
) -> Examples:
    """Generate the pairs, of which only the first `max_rows` are taken; see `generate_regex_pairs`."""
    count = num_pairs if max_rows is None else min(num_pairs, max_rows)
    pairs = generate_regex_pairs(num_pairs=count, seed=seed, split=split, task=task)
    rows = [Row(f"pair {number}", pair) for number, pair in enumerate(pairs, start=1)]
    return Examples(TASKS["nlrx"], rows, f"regex_pairs({task} task, {split}, seed {seed})")


regex_pairs = join_builder(
    "regex_pairs", "The built-in pairs, in the prompt of the nlrx task.", encode_examples, _generated_examples
)
