"""Languages of regexes: automata from derivatives, and what can be asked of them."""

from collections.abc import Iterator
from dataclasses import dataclass

from dllm_jepa.evals.nlrx._regex_syntax import Dialect, parse
from dllm_jepa.evals.nlrx._regex_terms import OTHER, WORD, Moves, Term, Terms

# Three times what the largest regex of NL-RX takes, and about half a second.
_BUDGET = 400_000
FINGERPRINT_LENGTH = 16
_PRIME = (1 << 61) - 1


@dataclass(frozen=True)
class Language:
    """The lines that a regex denotes as a whole, as a deterministic automaton that starts in state 0.

    Args:
        accepting: whether a line may end in a state, by state.
        moves: (mask of symbols, next state) by state; the masks of a state are disjoint and make up the alphabet.
    """

    accepting: tuple[bool, ...]
    moves: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def is_empty(self) -> bool:
        """Whether it has no line: all states can be reached."""
        return not any(self.accepting)

    def equals(self, other: "Language") -> bool:
        """Whether both have the same lines: the bisimulation of Hopcroft and Karp.

        Source: Hopcroft and Karp, "A Linear Algorithm for Testing Equivalence of Finite Automata", Cornell TR 71-114.
        """
        offset = len(self.accepting)
        parents = list(range(offset + len(other.accepting)))

        def root(state: int) -> int:
            while parents[state] != state:
                parents[state] = state = parents[parents[state]]
            return state

        pairs = [(0, 0)]
        while pairs:
            mine, theirs = pairs.pop()
            if self.accepting[mine] != other.accepting[theirs]:
                return False
            first, second = root(mine), root(offset + theirs)
            if first != second:
                parents[first] = second
                pairs += [
                    (next_mine, next_theirs)
                    for mask, next_mine in self.moves[mine]
                    for other_mask, next_theirs in other.moves[theirs]
                    if mask & other_mask
                ]
        return True

    def fingerprint(self) -> int:
        """A hash of its lines of at most 16 characters; the same for equal languages, hardly ever for others.

        The hash of a state is one of its lines, whatever the states they lead to: a mask is the sum of its symbols, so
        the sum over the moves is one over the symbols.
        """
        hashes = [0] * len(self.accepting)
        for _ in range(FINGERPRINT_LENGTH + 1):
            hashes = [
                (is_accepting + sum(mask * hashes[target] ** 2 for mask, target in moves)) % _PRIME
                for is_accepting, moves in zip(self.accepting, self.moves, strict=True)
            ]
        return hashes[0]


def read_language(regex: str, *, dialect: Dialect) -> Language:
    """The language of a regex.

    Raises:
        RegexSyntaxError: the text is no regex of the dialect.
        RegexTooLargeError: its automaton would take too much time or memory.
    """
    terms = Terms(_BUDGET)
    start = (parse(regex, terms, dialect=dialect), False)
    # A state: what the rest of the line has to be, and whether a word character stands before it.
    numbers: dict[tuple[Term, bool], int] = {start: 0}
    states = [start]
    moves = []
    for term, after_word in states:
        row = []
        for mask, state in _steps(terms.moves(term, after_word)):
            if state not in numbers:
                numbers[state] = len(states)
                states.append(state)
            row.append((mask, numbers[state]))
        moves.append(tuple(row))
    # The end of a line is no word character either.
    accepting = tuple(term.nullable_before(after_word) & OTHER != 0 for term, after_word in states)
    return Language(accepting, tuple(moves))


def _steps(moves: Moves) -> Iterator[tuple[int, tuple[Term, bool]]]:
    """The moves, apart by whether they end behind a word character where that matters."""
    for mask, target in moves:
        if not target.has_boundary:
            yield mask, (target, False)
            continue
        for side, is_word in ((mask & WORD, True), (mask & ~WORD, False)):
            if side:
                yield side, (target, is_word)
