r"""Regular expressions as hash-consed terms, and their derivatives.

A term denotes spans of lines. What a span is worth depends on three things alone: whether the character before it is a
word character, its own text, and whether the character behind it is a word character (beyond the ends of the line
there is none). So a term is a set of triples (before, text, behind):

- `\b` holds the triples without text in which just one neighbour is a word character;
- a concatenation holds (p, uv, n) if its head holds (p, u, first of v, or n) and its tail (last of u, or p, v, n);
- a complement holds the triples that its operand does not hold.

Hence the derivative by a character a after p: the term that holds (a, text, n) where the first one holds
(p, a text, n). It needs to know p, and which terms hold an empty text between p and a; nothing else.

Source: Brzozowski, "Derivatives of Regular Expressions", J. ACM 11 (1964), for terms without `\b`.
"""

import string
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

# The alphabet: TAB, 0x20-0x7e, and one symbol for every other character. A mask is a set of symbols: bit 0 is TAB,
# bits 1 to 95 are 0x20 to 0x7e in their order, bit 96 is every other one.
OTHER = 1 << 96
ALL = (1 << 97) - 1
_CODES = (ord("\t"), *range(0x20, 0x7F))

Kind = Literal["chars", "boundary", "epsilon", "concat", "repeat", "union", "complement"]

MAX_DEPTH = 64
# What a term and an operand that is looked at cost, in operations.
_TERM_COST = 10
_CHOICE_COST = 4
_ALWAYS = 0b1111


def symbol(character: str) -> int:
    """The mask of one character."""
    code = ord(character)
    if 0x20 <= code <= 0x7E:
        return 1 << (code - 0x1F)
    return 1 if character == "\t" else OTHER


def interval(first: str, last: str) -> int:
    """The mask of all characters from `first` to `last`, in the order of their code points; 0 if there is none."""
    named = [chr(code) for code in _CODES if ord(first) <= code <= ord(last)]
    others = ord(last) - ord(first) + 1 > len(named)
    return mask_of(named) | (OTHER if others else 0)


def mask_of(characters: str | list[str]) -> int:
    """The mask of several characters."""
    mask = 0
    for character in characters:
        mask |= symbol(character)
    return mask


DIGITS = mask_of(string.digits)
BLANKS = mask_of(" \t")
WORD = mask_of(string.ascii_letters + string.digits + "_")


class RegexTooLargeError(ValueError):
    """An expression that would take too much time or memory."""


@dataclass(frozen=True, eq=False, slots=True)
class Term:
    r"""A node; equal nodes of one `Terms` are the same object.

    Args:
        kind: what it is.
        operands: its operands: head and tail of a concatenation (the head is none itself), the alternatives of a
            union in the order of their numbers, the body of a repeat or a complement.
        mask: symbols of `chars`.
        least: fewest turns of a repeat.
        most: most turns of a repeat; None for no limit.
        nullable: bit 2p + n says whether it holds the empty text after p and before n (1 for a word character).
        has_boundary: whether a `\b` occurs in it; without, neighbours make no difference.
        depth: longest path to a leaf; concatenations side by side count once.
        number: when it was made.
    """

    kind: Kind
    operands: tuple["Term", ...]
    mask: int
    least: int
    most: int | None
    nullable: int
    has_boundary: bool
    depth: int
    number: int

    def nullable_before(self, after_word: bool) -> int:
        """The symbols in front of which it holds the empty text."""
        bits = self.nullable >> 2 * after_word
        return (ALL & ~WORD if bits & 1 else 0) | (WORD if bits & 2 else 0)


# Where a term goes by which symbols; the masks are disjoint and make up the alphabet, the targets differ.
Moves = tuple[tuple[int, Term], ...]


class Terms:
    """Makes terms in a normal form and derives them, within a budget.

    A union is associative, commutative and idempotent; so the derivatives of a term are finitely many. The other rules
    of the normal form only keep them few.

    Args:
        budget: how much may be done: terms made, operands sorted and moves computed, taken together. It does not
            depend on the speed of the machine, so neither does what is too large.
    """

    def __init__(self, budget: int) -> None:
        """Start with the four terms that have no operands."""
        self._budget = budget
        self._terms: dict[tuple[object, ...], Term] = {}
        self._moves: dict[tuple[Term, bool], Moves] = {}
        self.nothing = self.chars(0)
        self.epsilon = self._make("epsilon", nullable=_ALWAYS)
        self.boundary = self._make("boundary", nullable=0b0110, has_boundary=True)
        self.anything = self.complement(self.nothing)

    def spend(self, amount: int) -> None:
        """Take from the budget; `RegexTooLargeError` if nothing is left."""
        self._budget -= amount
        if self._budget < 0:
            raise RegexTooLargeError("more operations than the bound allows")

    def chars(self, mask: int) -> Term:
        """One character out of a set; the empty set is the empty language."""
        return self._make("chars", mask=mask)

    def concat(self, head: Term, tail: Term) -> Term:
        """One after the other."""
        heads = []
        while head.kind == "concat":
            heads.append(head.operands[0])
            head = head.operands[1]
        self.spend(len(heads))
        tail = self._prepend(head, tail)
        for part in reversed(heads):
            tail = self._prepend(part, tail)
        return tail

    def _prepend(self, head: Term, tail: Term) -> Term:
        if self.nothing in (head, tail):
            return self.nothing
        while head is not self.epsilon and tail is not self.epsilon:
            second, rest = tail.operands if tail.kind == "concat" else (tail, self.epsilon)
            (body, least, most), (second_body, second_least, second_most) = _turns(head), _turns(second)
            if self.anything in (head, second) and head.nullable == second.nullable == _ALWAYS:
                head = self.anything
            elif body is second_body:
                both = None if most is None or second_most is None else most + second_most
                head = self.repeat(body, least + second_least, both)
            else:
                return self._make("concat", (head, tail), nullable=head.nullable & tail.nullable)
            tail = rest
        return tail if head is self.epsilon else head

    def repeat(self, body: Term, least: int, most: int | None) -> Term:
        """From `least` to `most` times (None for no limit) in a row."""
        if body.nullable == _ALWAYS:
            least = 0
        if most == 0 or body is self.epsilon or (body is self.nothing and least == 0):
            return self.epsilon
        is_closed = body is self.anything or (body.kind == "repeat" and body.least == 0 and body.most is None)
        if (least, most) == (1, 1) or body is self.nothing or is_closed:
            return body
        if (body.mask, least, most) == (ALL, 0, None):
            return self.anything
        return self._make("repeat", (body,), least=least, most=most, nullable=body.nullable if least else _ALWAYS)

    def union(self, alternatives: Iterable[Term]) -> Term:
        """Any of them."""
        mask = 0
        found: set[Term] = set()
        for term in alternatives:
            parts = term.operands if term.kind == "union" else (term,)
            self.spend(len(parts))
            for part in parts:
                if part.kind == "chars":
                    mask |= part.mask
                else:
                    found.add(part)
        if mask:
            found.add(self.chars(mask))
        if any(part.kind == "complement" and part.operands[0] in found or part is self.anything for part in found):
            return self.anything
        if self.epsilon in found and any(part.nullable == _ALWAYS for part in found if part is not self.epsilon):
            found.remove(self.epsilon)
        found = self._unabsorbed(found)
        if len(found) < 2:
            return found.pop() if found else self.nothing
        parts = tuple(sorted(found, key=lambda part: part.number))
        nullable = 0
        for part in parts:
            nullable |= part.nullable
        return self._make("union", parts, nullable=nullable)

    def _unabsorbed(self, parts: set[Term]) -> set[Term]:
        # Anything and then x holds all that ends in x.
        rests = {part.operands[1] for part in parts if self._is_after_anything(part)}
        return {part for part in parts if rests.isdisjoint(self._ends(part))} if rests else parts

    def _ends(self, term: Term) -> list[Term]:
        ends = [term]
        while term.kind == "concat":
            term = term.operands[1]
            ends.append(term)
        self.spend(len(ends) // 4)  # A look at an end costs little.
        # What comes right behind anything is not among them, or the term would absorb itself.
        return ends[2:] if self._is_after_anything(ends[0]) else ends

    def _is_after_anything(self, term: Term) -> bool:
        return term.kind == "concat" and term.operands[0] is self.anything

    def intersection(self, conjuncts: Iterable[Term]) -> Term:
        """All of them: what is not outside of any."""
        return self.complement(self.union([self.complement(term) for term in conjuncts]))

    def complement(self, body: Term) -> Term:
        """Every span that is not one of the body's."""
        if body.kind == "complement":
            return body.operands[0]
        return self._make("complement", (body,), nullable=body.nullable ^ _ALWAYS)

    def _make(
        self,
        kind: Kind,
        operands: tuple[Term, ...] = (),
        *,
        mask: int = 0,
        least: int = 0,
        most: int | None = None,
        nullable: int = 0,
        has_boundary: bool = False,
    ) -> Term:
        key = (kind, operands, mask, least, most)
        term = self._terms.get(key)
        if term is None:
            self.spend(_TERM_COST)
            depth = max((part.depth + (not kind == part.kind == "concat") for part in operands), default=0)
            if depth > MAX_DEPTH:
                raise RegexTooLargeError(f"nested deeper than {MAX_DEPTH} operators")
            has_boundary = has_boundary or any(operand.has_boundary for operand in operands)
            number = len(self._terms)
            term = Term(kind, operands, mask, least, most, nullable, has_boundary, depth, number)
            self._terms[key] = term
        return term

    def moves(self, term: Term, after_word: bool) -> Moves:
        """The derivatives by every symbol, behind a word character or not."""
        key = (term, after_word and term.has_boundary)
        found = self._moves.get(key)
        if found is None:
            found = self._moves[key] = self._derive(*key)
            self.spend(_TERM_COST + len(found))
        return found

    def _derive(self, term: Term, after_word: bool) -> Moves:
        if term.kind == "chars":
            return _merge([(term.mask, self.epsilon), (ALL ^ term.mask, self.nothing)])
        if term.kind == "concat":
            return self._derive_concat(term, after_word)
        if term.kind == "repeat":
            return self._derive_repeat(term, after_word)
        if term.kind == "union":
            return self._union_moves([self.moves(part, after_word) for part in term.operands])
        if term.kind == "complement":
            return tuple((mask, self.complement(target)) for mask, target in self.moves(term.operands[0], after_word))
        return ((ALL, self.nothing),)

    def _derive_concat(self, term: Term, after_word: bool) -> Moves:
        choices = []
        scope = ALL  # Symbols in front of which all the heads so far hold the empty text.
        while term.kind == "concat" and scope:
            head, tail = term.operands
            moves = [(mask & scope, self.concat(target, tail)) for mask, target in self.moves(head, after_word)]
            choices.append(_merge([*moves, (ALL & ~scope, self.nothing)]))
            scope &= head.nullable_before(after_word)
            term = tail
        if scope:
            last = [(mask & scope, target) for mask, target in self.moves(term, after_word)]
            choices.append(_merge([*last, (ALL & ~scope, self.nothing)]))
        return self._union_moves(choices)

    def _derive_repeat(self, term: Term, after_word: bool) -> Moves:
        (body,) = term.operands
        most = None if term.most is None else term.most - 1
        # Where the body holds the empty text, all turns that the repeat still owes may be taken at once.
        skippable = body.nullable_before(after_word)
        rest, skipped = self.repeat(body, max(term.least - 1, 0), most), self.repeat(body, 0, most)
        moves = []
        for mask, target in self.moves(body, after_word):
            moves += [(mask & ~skippable, self.concat(target, rest)), (mask & skippable, self.concat(target, skipped))]
        return _merge(moves)

    def _union_moves(self, choices: list[Moves]) -> Moves:
        classes: list[tuple[int, tuple[Term, ...]]] = [(ALL, ())]
        for moves in choices:
            classes = [
                (mask & other, (*targets, target))
                for mask, targets in classes
                for other, target in moves
                if mask & other
            ]
        self.spend((len(classes) + _CHOICE_COST) * len(choices))
        return _merge([(mask, self.union(targets)) for mask, targets in classes])


def _turns(term: Term) -> tuple[Term, int, int | None]:
    return (term.operands[0], term.least, term.most) if term.kind == "repeat" else (term, 1, 1)


def _merge(moves: list[tuple[int, Term]]) -> Moves:
    masks: dict[Term, int] = {}
    for mask, target in moves:
        if mask:
            masks[target] = masks.get(target, 0) | mask
    return tuple((mask, target) for target, mask in masks.items())
