r"""The regex dialect of NL-RX.

From the weakest to the strongest: `|`, `&` (intersection), concatenation, the postfixes `? * + {n} {n,} {n,m}`, the
prefix `~` (complement). So `~ab*` is `(~a)(b*)`, and `~a*` is `(~a)*`; postfixes may follow each other, each applies to
all that stands before it. A place where an operand of `|`, `&` or a pair of parentheses could stand but does not is the
empty string, as is the empty regex; a postfix or a `~` without an operand is an error.

Atoms: parentheses; `[...]` and `[^...]` with members, ranges and escapes, where a `]` in the first and a `-` in the
first or last place are members; `.`; `\d \w \s \D \W \S`; `\b`, a zero-width word boundary or, in the dialect `brics`,
a literal b; `\` before any other character is that character (so `\t` is a t); every other character is itself.
A blank is a character. `\s` is a blank or a TAB.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

from dllm_jepa.evals.nlrx._regex_terms import ALL, BLANKS, DIGITS, WORD, Term, Terms, interval, symbol

Dialect = Literal["word_boundary", "brics"]

MAX_LENGTH = 1000
MAX_REPEAT = 64

_POSTFIXES = {"?": (0, 1), "*": (0, None), "+": (1, None)}
_BRACES = re.compile(r"\{([0-9]{1,4})(?:(,)([0-9]{0,4}))?\}")
_CLASSES = {
    "d": DIGITS,
    "w": WORD,
    "s": BLANKS,
    "D": ALL & ~DIGITS,
    "W": ALL & ~WORD,
    "S": ALL & ~BLANKS,
}


class RegexSyntaxError(ValueError):
    """A text that is no regex of the dialect."""


@dataclass
class _Level:
    """What has been read between two parentheses: alternatives, conjuncts of the last one, factors of its last one.

    The next factor is complemented if `is_complement`, which is None where no `~` stands before it.
    """

    alternatives: list[Term] = field(default_factory=list)
    conjuncts: list[Term] = field(default_factory=list)
    factors: list[Term] = field(default_factory=list)
    is_complement: bool | None = None


def parse(text: str, terms: Terms, *, dialect: Dialect) -> Term:
    """Read a regex; without recursion, so that no nesting is too deep for it.

    Raises:
        RegexSyntaxError: the text is no regex, is longer than 1,000 characters or has a repeat above 64.
        RegexTooLargeError: from `terms`.
        ValueError: there is no such dialect.
    """
    if dialect not in get_args(Dialect):
        raise ValueError(f"dialect must be one of {', '.join(get_args(Dialect))}, got {dialect!r}")
    if len(text) > MAX_LENGTH:
        raise RegexSyntaxError(f"{len(text)} characters, more than {MAX_LENGTH}")
    return _Parser(text, terms, dialect).parse()


class _Parser:
    def __init__(self, text: str, terms: Terms, dialect: Dialect) -> None:
        self.text = text
        self.terms = terms
        self.dialect = dialect
        self.position = 0
        self.levels = [_Level()]
        self.actions: dict[str, Callable[[], None]] = {
            "|": self.end_alternative,
            "&": self.end_conjunct,
            "~": self.negate,
            "(": self.open,
            ")": self.close,
            **dict.fromkeys("?*+{", self.postfix),
        }

    def parse(self) -> Term:
        while self.position < len(self.text):
            self.actions.get(self.text[self.position], self.atom)()
        if len(self.levels) > 1:
            raise self.error("a ( without )")
        self.end_alternative()
        return self.terms.union(self.levels[0].alternatives)

    def error(self, message: str) -> RegexSyntaxError:
        return RegexSyntaxError(f"{message} at character {self.position}")

    def add(self, factor: Term) -> None:
        level = self.levels[-1]
        level.factors.append(self.terms.complement(factor) if level.is_complement else factor)
        level.is_complement = None

    def end_conjunct(self) -> None:
        level = self.levels[-1]
        if level.is_complement is not None:
            raise self.error("a ~ without an operand")
        conjunct = self.terms.epsilon
        for factor in reversed(level.factors):
            conjunct = self.terms.concat(factor, conjunct)
        level.conjuncts.append(conjunct)
        level.factors = []
        self.position += 1

    def end_alternative(self) -> None:
        self.end_conjunct()
        level = self.levels[-1]
        level.alternatives.append(self.terms.intersection(level.conjuncts))
        level.conjuncts = []

    def negate(self) -> None:
        level = self.levels[-1]
        level.is_complement = not level.is_complement
        self.position += 1

    def open(self) -> None:
        self.levels.append(_Level())
        self.position += 1

    def close(self) -> None:
        if len(self.levels) == 1:
            raise self.error("a ) without (")
        self.end_alternative()
        self.add(self.terms.union(self.levels.pop().alternatives))

    def postfix(self) -> None:
        level = self.levels[-1]
        if not level.factors or level.is_complement is not None:
            raise self.error("nothing to repeat")
        least, most = self.turns()
        level.factors[-1] = self.terms.repeat(level.factors[-1], least, most)

    def turns(self) -> tuple[int, int | None]:
        character = self.text[self.position]
        if character in _POSTFIXES:
            self.position += 1
            return _POSTFIXES[character]
        found = _BRACES.match(self.text, self.position)
        if found is None:
            raise self.error("not {n}, {n,} or {n,m}")
        least = int(found[1])
        most = least if found[2] is None else int(found[3]) if found[3] else None
        if max(least, most or 0) > MAX_REPEAT:
            raise self.error(f"a repeat above {MAX_REPEAT}")
        if most is not None and most < least:
            raise self.error("a repeat from more to less")
        self.position = found.end()
        return least, most

    def atom(self) -> None:
        character = self.text[self.position]
        if character == "[":
            self.add(self.terms.chars(self.bracket()))
        elif character == ".":
            self.position += 1
            self.add(self.terms.chars(ALL))
        elif self.is_boundary():
            self.position += 2
            self.add(self.terms.boundary)
        else:
            self.add(self.terms.chars(self.member()[1]))

    def is_boundary(self) -> bool:
        return self.dialect == "word_boundary" and self.text.startswith("\\b", self.position)

    def member(self) -> tuple[str, int]:
        """The next character, escaped or not ("" if that is a named class), and its mask."""
        is_escaped = self.text[self.position] == "\\"
        self.position += is_escaped
        if self.position == len(self.text):
            raise self.error("nothing behind \\")
        character = self.text[self.position]
        self.position += 1
        if is_escaped and character in _CLASSES:
            return "", _CLASSES[character]
        return character, symbol(character)

    def bracket(self) -> int:
        self.position += 1
        is_negated = self.text.startswith("^", self.position)
        self.position += is_negated
        mask = self.bracket_item()
        while not self.text.startswith("]", self.position):
            mask |= self.bracket_item()
        self.position += 1
        return ALL & ~mask if is_negated else mask

    def bracket_item(self) -> int:
        first, mask = self.bracket_member()
        is_range = self.text.startswith("-", self.position) and not self.text.startswith("]", self.position + 1)
        if not (first and is_range):
            return mask
        self.position += 1
        last, _ = self.bracket_member()
        if last < first:
            raise self.error("a range from more to less")
        return interval(first, last)

    def bracket_member(self) -> tuple[str, int]:
        if self.position == len(self.text):
            raise self.error("a [ without ]")
        if self.is_boundary():
            raise self.error("a word boundary between [ and ]")
        return self.member()
