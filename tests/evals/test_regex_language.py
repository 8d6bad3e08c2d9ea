"""Languages of random regexes, against a naive evaluation of their spans and against an automata library."""

import itertools
import random
from functools import lru_cache, reduce

import numpy as np
from greenery.charclass import DOT, Charclass
from greenery.fsm import EPSILON, Fsm, from_charclass

from dllm_jepa.evals.nlrx import equivalent
from dllm_jepa.evals.nlrx._regex_language import Language, read_language
from dllm_jepa.evals.nlrx._regex_terms import symbol

# A syntax tree: its kind, and its operands. chars: text and members; repeat: body, least, most (None for no limit).
Tree = tuple
LETTERS = "ab-"
LEAVES = [
    ("chars", "a", "a"),
    ("chars", "[ab]", "ab"),
    ("chars", "[^a]", "b-"),
    ("chars", ".", LETTERS),
    ("concat",),
]
WORD_LEAVES = [
    ("chars", "-", "-"),
    ("chars", r"\w", "ab"),
    ("chars", r"\W", "-"),
    ("boundary",),
    ("boundary",),
    ("union", ("boundary",), ("chars", "a", "a")),
]
LEVELS = {"union": 0, "and": 1, "concat": 2, "repeat": 3, "not": 4}
REPEATS = {(0, 1): "?", (0, None): "*", (1, None): "+"}


def random_tree(rng: random.Random, depth: int, leaves: list[Tree]) -> Tree:
    if depth == 0 or rng.random() < 0.1:
        return rng.choice(leaves)
    kind = rng.choice(["union", "and", "concat", "concat", "repeat", "not"])
    if kind == "not":
        return ("not", random_tree(rng, depth - 1, leaves))
    if kind == "repeat":
        least = rng.randrange(3)
        most = rng.choice([None, max(1, least), least + 1, least + 2])
        return ("repeat", random_tree(rng, depth - 1, leaves), least, most)
    return (kind, *(random_tree(rng, depth - 1, leaves) for _ in range(rng.choice([2, 2, 3]))))


def write(tree: Tree, level: int = 0) -> str:
    """The tree as a regex, with no parentheses that the precedence makes superfluous."""
    kind, *operands = tree
    if kind == "chars":
        return operands[0]
    if kind == "boundary":
        return r"\b"
    own = LEVELS[kind]
    if kind == "not":
        text = "~" + write(operands[0], own)
    elif kind == "repeat":
        body, least, most = operands
        braces = f"{{{least}}}" if least == most else f"{{{least},{'' if most is None else most}}}"
        text = write(body, own) + REPEATS.get((least, most), braces)
    elif not operands:
        return "()"
    else:
        text = {"union": "|", "and": "&", "concat": ""}[kind].join(write(operand, own + 1) for operand in operands)
    return f"({text})" if own < level else text


def spans(tree: Tree, lines: np.ndarray) -> np.ndarray:
    """The spans that a tree denotes, straight from the definition.

    Args:
        tree: the tree.
        lines: characters [N, L] of N lines.

    Returns:
        bool [N, L + 1, L + 1]: whether the span from i to j is one of them.
    """
    num_lines, length = lines.shape
    none = np.zeros((num_lines, length + 1, length + 1), dtype=bool)
    empty = none | np.eye(length + 1, dtype=bool)
    kind, *operands = tree
    if kind == "chars":
        none[:, range(length), range(1, length + 1)] = np.isin(lines, list(operands[1]))
        return none
    if kind == "boundary":
        is_word = np.pad(lines != "-", ((0, 0), (1, 1)))
        return empty & (is_word[:, 1:] != is_word[:, :-1])[:, None]
    if kind == "repeat":
        body, least, most = operands
        denoted = spans(body, lines)
        # After length + 1 more turns, some of which take no character, nothing new comes.
        powers = list(
            itertools.accumulate([denoted] * (least + length + 1 if most is None else most), join, initial=empty)
        )
        return reduce(np.logical_or, powers[least:])
    parts = [spans(operand, lines) for operand in operands]
    if kind == "not":
        return np.triu(~parts[0])
    return reduce(
        {"union": np.logical_or, "and": np.logical_and, "concat": join}[kind], parts, *[empty] * (kind == "concat")
    )


def join(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left[..., None] & right[:, None]).any(axis=2)


def all_lines(length: int) -> np.ndarray:
    return np.array(list(itertools.product(LETTERS, repeat=length)), dtype="<U1").reshape(
        len(LETTERS) ** length, length
    )


def accepted(language: Language, length: int) -> list[bool]:
    """Whether it has each of `all_lines`, in their order."""
    steps = [
        [next(target for mask, target in moves if mask & symbol(letter)) for letter in LETTERS]
        for moves in language.moves
    ]
    states = [0]
    for _ in range(length):
        states = [target for state in states for target in steps[state]]
    return [language.accepting[state] for state in states]


def test_lines_are_those_whose_whole_span_is_denoted() -> None:
    rng = random.Random(0)
    num_accepted = num_lines = num_boundaries = 0
    for _ in range(250):
        tree = random_tree(rng, 4, LEAVES + WORD_LEAVES)
        regex = write(tree)
        language = read_language(regex, dialect="word_boundary")
        for length in range(5):
            lines = all_lines(length)
            expected = spans(tree, lines)[:, 0, -1].tolist()
            assert accepted(language, length) == expected, regex
            num_accepted, num_lines = num_accepted + sum(expected), num_lines + len(expected)
        num_boundaries += r"\b" in regex
    assert 0.2 < num_accepted / num_lines < 0.8 and num_boundaries > 150


def automaton_of(tree: Tree) -> Fsm:
    """The same language by the automata library."""
    kind, *operands = tree
    if kind == "chars":
        return from_charclass({".": DOT, "[^a]": ~Charclass("a")}.get(operands[0], Charclass(operands[1])))
    parts = [automaton_of_subtree(operand) for operand in operands if isinstance(operand, tuple)]
    if kind == "not":
        return parts[0].everythingbut()
    if kind == "repeat":
        (body,), (least, most) = parts, operands[1:]
        return body.times(least).concatenate(body.star() if most is None else (body | EPSILON).times(most - least))
    return {"union": Fsm.union, "and": Fsm.intersection, "concat": EPSILON.concatenate}[kind](*parts)


automaton_of_subtree = lru_cache(maxsize=None)(automaton_of)


def rewrite(rng: random.Random, tree: Tree) -> Tree:
    """Another regex of the same language."""
    kind, *operands = tree
    if kind == "repeat":
        body, (least, most) = rewrite(rng, operands[0]), operands[1:]
        rest = None if most is None else most - least
        tree = rng.choice([("repeat", body, least, most), ("concat", *[body] * least, ("repeat", body, 0, rest))])
    elif kind != "chars":
        operands = [rewrite(rng, operand) for operand in operands]
        if kind in ("union", "and"):
            rng.shuffle(operands)
        tree = (kind, *operands)
        if kind in ("union", "and") and rng.random() < 0.5:
            tree = ("not", ({"union": "and", "and": "union"}[kind], *(("not", operand) for operand in operands)))
    same = [("not", ("not", tree)), ("union", tree, tree), ("and", tree, tree), ("concat", tree, ("concat",))]
    return rng.choice([*[tree] * 5, *same])


def mutate(rng: random.Random, tree: Tree) -> Tree:
    """A regex that differs in one place, and so mostly in its language."""
    kind, *operands = tree
    places = [place for place, operand in enumerate(operands) if isinstance(operand, tuple)]
    if not places or rng.random() < 0.2:
        return random_tree(rng, 1, LEAVES)
    place = rng.choice(places)
    operands[place] = mutate(rng, operands[place])
    return (kind, *operands)


def test_random_pairs_are_equal_where_an_automata_library_says_so() -> None:
    rng = random.Random(0)
    num_equal = 0
    for number in range(400):
        tree = random_tree(rng, 2 + (number % 20 == 0), LEAVES)
        other = rewrite(rng, tree if number % 5 < 2 else mutate(rng, tree))
        expected = automaton_of(tree).equivalent(automaton_of(other))
        assert equivalent(write(tree), write(other)) == expected, (write(tree), write(other))
        num_equal += expected
    assert 120 < num_equal < 280, num_equal
