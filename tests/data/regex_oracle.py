r"""An independent reading of the NL-RX dialect: parser, and search for accepted and rejected lines by derivatives.

`|` < `&` < concatenation < postfix `+ * ? {n} {n,} {n,m}` < prefix `~`; `\b` is a zero-width word boundary. A state of
the search is what is left of the regex and whether the last character was one of a word.

Source: Brzozowski, Derivatives of Regular Expressions, 1964.
"""

import re
import string
from functools import cache, lru_cache
from typing import Any

ALPHABET = ["\t", *map(chr, range(0x20, 0x7F)), "\u2603"]
WORD_CHARACTERS = set(string.ascii_letters + string.digits + "_")
ESCAPES = {"d": set(string.digits), "w": WORD_CHARACTERS, "s": {" ", "\t"}}
EMPTY: Any = ("set", frozenset())
EPSILON: Any = ("epsilon",)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def take(self) -> str:
        self.at += 1
        return self.text[self.at - 1]

    def joined(self, sign: str, kind: str, inner: Any) -> Any:
        parts = [inner()]
        while self.peek() == sign:
            self.take()
            parts.append(inner())
        return parts[0] if len(parts) == 1 else (kind, frozenset(parts))

    def union(self) -> Any:
        return self.joined("|", "or", lambda: self.joined("&", "and", self.concatenation))

    def concatenation(self) -> Any:
        result = EPSILON
        while self.peek() not in ("", "|", "&", ")"):
            result = concatenate(result, self.postfix())
        return result

    def postfix(self) -> Any:
        result = self.prefix()
        while match := re.compile(r"[?*+]|\{(\d+)(,?)(\d*)\}").match(self.text, self.at):
            self.at = match.end()
            if match[1] is None:
                low, high = {"?": (0, 1), "*": (0, None), "+": (1, None)}[match[0]]
            else:
                low = int(match[1])
                high = low if not match[2] else int(match[3]) if match[3] else None
            result = ("repeat", result, low, high)
        return result

    def prefix(self) -> Any:
        if self.peek() == "~":
            self.take()
            return ("not", self.prefix())
        return self.atom()

    def atom(self) -> Any:
        sign = self.take()
        if sign == "(":
            inside = self.union()
            assert self.take() == ")"
            return inside
        if sign == "[":
            end = self.text.index("]", self.at)
            # Python reads the simple classes of these pairs as the dialect does.
            members = re.compile(f"[{self.text[self.at : end]}]")
            self.at = end + 1
            return ("set", frozenset(filter(members.fullmatch, ALPHABET)))
        if sign == "\\":
            name = self.take()
            return ("boundary",) if name == "b" else ("set", frozenset(ESCAPES[name]))
        assert sign not in "]{}?*+"
        return ("set", frozenset(ALPHABET) if sign == "." else frozenset(sign))


def parse(text: str) -> Any:
    """The tree of a regex, with the operands of `|` and `&` as sets, so that their order makes no difference."""
    parser = _Parser(text)
    tree = parser.union()
    assert parser.at == len(text), f"{text!r} stops making sense at {parser.at}"
    return tree


def concatenate(first: Any, second: Any) -> Any:
    if EMPTY in (first, second):
        return EMPTY
    if first == EPSILON or second == EPSILON:
        return second if first == EPSILON else first
    return ("then", first, second)


def unite(parts: list[Any]) -> Any:
    flat = {one for part in parts for one in (part[1] if part[0] == "or" else (part,))} - {EMPTY}
    return EMPTY if not flat else next(iter(flat)) if len(flat) == 1 else ("or", frozenset(flat))


@cache
def nullable(tree: Any, boundary: bool) -> bool:
    match tree[0]:
        case "set":
            return False
        case "epsilon":
            return True
        case "boundary":
            return boundary
        case "then":
            return nullable(tree[1], boundary) and nullable(tree[2], boundary)
        case "or":
            return any(nullable(part, boundary) for part in tree[1])
        case "and":
            return all(nullable(part, boundary) for part in tree[1])
        case "not":
            return not nullable(tree[1], boundary)
    return tree[2] == 0 or nullable(tree[1], boundary)


@lru_cache(maxsize=200_000)
def derivative(tree: Any, character: str, boundary: bool) -> Any:
    match tree[0]:
        case "set":
            return EPSILON if character in tree[1] else EMPTY
        case "epsilon" | "boundary":
            return EMPTY
        case "then":
            parts = [concatenate(derivative(tree[1], character, boundary), tree[2])]
            if nullable(tree[1], boundary):
                parts.append(derivative(tree[2], character, boundary))
            return unite(parts)
        case "or":
            return unite([derivative(part, character, boundary) for part in tree[1]])
        case "and":
            return ("and", frozenset(derivative(part, character, boundary) for part in tree[1]))
        case "not":
            return ("not", derivative(tree[1], character, boundary))
    _, inner, low, high = tree
    if high == 0:
        return EMPTY
    rest = ("repeat", inner, max(0, low - 1), None if high is None else high - 1)
    return concatenate(derivative(inner, character, boundary), rest)


def accepts(tree: Any, line: str) -> bool:
    """Whether a whole line is in the language."""
    last_is_word = False
    for character in line:
        is_word = character in WORD_CHARACTERS
        tree = derivative(tree, character, is_word != last_is_word)
        last_is_word = is_word
    return nullable(tree, last_is_word)


def _sets(tree: Any) -> set[frozenset[str]]:
    if tree[0] == "set":
        return {tree[1]}
    parts = tree[1] if tree[0] in ("or", "and") else [part for part in tree[1:] if isinstance(part, tuple)]
    return {members for part in parts for members in _sets(part)}


def witnesses(tree: Any) -> tuple[str | None, str | None]:
    """A shortest accepted and a shortest rejected line; None where the search through all states finds none."""
    sets = [*_sets(tree), WORD_CHARACTERS]
    # One character for all that no set tells apart.
    characters = {tuple(character in members for members in sets): character for character in reversed(ALPHABET)}
    found: dict[bool, str] = {}
    seen = {(tree, False)}
    frontier = [(tree, False, "")]
    while frontier and len(found) < 2:
        reached = []
        for state, last_is_word, line in frontier:
            found.setdefault(nullable(state, last_is_word), line)
            for character in characters.values():
                is_word = character in WORD_CHARACTERS
                following = derivative(state, character, is_word != last_is_word)
                if (following, is_word) not in seen:
                    seen.add((following, is_word))
                    reached.append((following, is_word, line + character))
        frontier = reached
    return found.get(True), found.get(False)
