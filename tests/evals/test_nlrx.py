"""Scores of regexes, and the equality of languages that they rest on."""

import random
import time

import pytest

from dllm_jepa.errors import DataError
from dllm_jepa.evals.nlrx import _regex_language as regex_language
from dllm_jepa.evals.nlrx import best_constant, equivalent, gold_regex, is_empty, score

# Pairs of regexes in the style of NL-RX: the same lines, then different lines.
SAME = [
    (r"~(\b)dog", ".+dog"),
    (r"\bdog\b", "dog"),
    (r"\b(dog)(.*)\b", "dog|dog(.*)[A-Za-z0-9_]"),
    (r"(.*)(\b([A-Za-z]){7,}\b)", r"([A-Za-z]){7,}|.*(\W)([A-Za-z]){7,}"),
    (r".*\bdog\b.*", r"(.*\W)?dog(\W.*)?"),
    (r"~(.*\bdog\b.*)", r"~((.*\W)?dog(\W.*)?)"),
    (r"\b.*\b", r"\w|\w.*\w"),
    (r"~(\b.*\b)", r"(\W.*)?|.*\W"),
    (r"(\b){3}dog", "dog"),
    (r"~(\b)", ".*"),
    (r"a~(\b)b", "a.*b"),
    (r"a(~(\b)&())b", "ab"),
    (r"a~(\b)-", "a.+-"),
    (r"(\b|a){2}-", "a{1,2}-"),
    ("((.*)(dog))|((.*)(truck))", ".*(dog|truck)"),
    ("~(~(.*dog.*)|~(.*truck.*))", "(.*dog.*)&(.*truck.*)"),
    ("(.*dog.*)&(.*truck.*)", ".*dog.*truck.*|.*truck.*dog.*"),
    ("([0-9])&([A-Z])", "~(.*)"),
    (".*([a-z])|([AEIOUaeiou])|([A-Za-z]).*", r"(.*[a-z])|[AEIOU]|([A-Z].*)|([a-z].*)"),
    ("((.*dog.*)|(truck)){2,}", "(.*dog.*|truck)(.*dog.*|truck)+"),
    ("~((.*[0-9].*){3,})", "([^0-9]*[0-9]?){2}[^0-9]*"),
]
DIFFERENT = [
    (r"~(\b)dog", ".*dog"),
    (r"~(\bdog)", ".+dog"),
    (r"\bdog", "~(.*)"),
    (r".*\bdog\b.*", ".*dog.*"),
    (r"\b.*\b", ".*"),
    (".*dog.*truck.*", ".*truck.*dog.*"),
    ("(.*dog.*)&(.*truck.*)", ".*dog.*truck.*"),
    (".*[a-z].*", ".*[A-Za-z].*"),
    ("([a-z].*){2,}", "([a-z].*){3,}"),
    ("", "~(.*)"),
    ("~(.)", ".*"),
]

HOSTILE = {
    "nested repeats": "(((.{64}){64}){64}){64}",
    "postfixes": "a" + "{2,64}" * 140,
    "subsets": ".*a.{40}",
    "intersections": "&".join(f"(.*{letter}.*){{5,}}" for letter in "abcdefghijklmnopqrstuvwxyz"),
    "complements": "(~((~((~((~((~((.*a.*){3})b){3})c){3})d){3})e){3})f){3}",
    "boundaries": r"(\b.*a.*b.*c.*|d\b.*\bf){64}",
    "long words": "(" + "".join(chr(97 + number * number % 26) for number in range(900)) + "){64}",
    "depth": "(a.*b|c" * 80 + ")*d" * 80,
    "brackets": "[" * 1000,
    "megabyte": "a" * 1_000_000,
    "surrogates": "(\ud800",
}


def test_same_and_different_lines() -> None:
    for pairs, expected in ((SAME, True), (DIFFERENT, False)):
        for regex, other in pairs:
            assert equivalent(regex, other) is equivalent(other, regex) is expected, (regex, other)


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_hostile_regexes_equal_nothing_and_end_soon(hostile: str) -> None:
    start = time.process_time()
    assert not equivalent(hostile, hostile)
    assert time.process_time() - start < 2


def test_random_texts_never_raise() -> None:
    rng = random.Random(0)
    num_regexes = 0
    for _ in range(1500):
        pieces = rng.choices(
            ["|", "&", "~", "(", ")", "[", "]", "{2}", "{", "*", "\\", "\\b", "^", "-", "a", "9", "\udfff"], k=6
        )
        text = "".join(pieces)
        num_regexes += equivalent(text, text)
    assert 50 < num_regexes < 1000, num_regexes


@pytest.mark.parametrize(
    ("gold", "prediction", "expected"),
    [
        (".*dog.*", " .*dog.*\n", (True, True, True)),
        (".*dog.*", ".*(dog).*", (True, False, True)),
        (".*dog.*", ".*cat.*", (False, False, False)),
        ("([0-9])&([a-z])", "~(.*)", (True, False, None)),
        ("([0-9])&([a-z])", ".*", (False, False, None)),
    ],
)
def test_score(gold: str, prediction: str, expected: tuple[bool | None, ...]) -> None:
    found = score(prediction, {"description": "a line", "regex": gold})
    names = ("functional_match", "exact_match", "functional_match_nonempty")
    assert (tuple(found.measures.items()), found.note) == (tuple(zip(names, expected, strict=True)), "")


def test_score_says_why_a_prediction_cannot_be_compared() -> None:
    row = {"regex": ".*dog.*"}
    assert score("(dog", row).note == "unparsable: a ( without ) at character 4"
    assert score(HOSTILE["subsets"], row).note == "too large: more operations than the bound allows"
    assert score(HOSTILE["depth"], row).note == "too large: nested deeper than 64 operators"
    assert score("(dog", row).value is False and score(HOSTILE["depth"], row).value is False


def test_score_in_the_dialect_without_word_boundaries() -> None:
    row = {"regex": r"\bdog"}
    assert score("dog", row).value and not score("bdog", row).value
    assert score("bdog", row, dialect="brics").value and not score("dog", row, dialect="brics").value
    assert score(r"(\b)dog", row, dialect="brics").value
    assert score("~(.*)", {"regex": r"a\bb"}).measures["functional_match_nonempty"] is None
    assert score("abb", {"regex": r"a\bb"}, dialect="brics").measures["functional_match_nonempty"] is True


@pytest.mark.parametrize("regex", ["(dog", HOSTILE["depth"]])
def test_a_gold_regex_that_cannot_be_compared_is_refused(regex: str) -> None:
    assert gold_regex({"regex": " .*dog\n"}) == ".*dog"
    for refuse in (lambda: gold_regex({"regex": regex}), lambda: score("a", {"regex": regex})):
        with pytest.raises(DataError, match="field 'regex' is '.*', which cannot be compared: .*remove the row"):
            refuse()


def test_is_empty() -> None:
    assert is_empty("~(.*)") and is_empty(r"dog\bs") and is_empty("[a-z]&[0-9]") and is_empty("(dog)&(truck)")
    assert not is_empty("") and not is_empty("~()") and not is_empty(r"dog\b")
    with pytest.raises(ValueError, match="without"):
        is_empty("(")


def test_best_constant() -> None:
    regexes = ["a&b", "(.*)(dog)", "[0-9]&[a-z]", ".*dog", "c", "((.)*)dog", "c", ".*(dog)"]
    assert best_constant(regexes) == (".*dog", 4)
    assert best_constant(["ab", "a|b", "c&d", "b|a"]) == ("a|b", 2)
    assert best_constant(["x", "y", "y", "x"]) == ("x", 2)
    with pytest.raises(ValueError, match="there is no regex"):
        best_constant([])
    with pytest.raises(ValueError, match="without"):
        best_constant(["a", "("])


def test_best_constant_compares_what_has_the_same_fingerprint() -> None:
    """Beyond the length that fingerprints look at, only the comparison tells languages apart."""
    beyond = regex_language.FINGERPRINT_LENGTH + 1
    first, second = (regex_language.read_language(f"{letter}{{{beyond}}}", dialect="word_boundary") for letter in "ab")
    assert first.fingerprint() == second.fingerprint() and not first.equals(second)
    assert best_constant([f"a{{{beyond}}}", f"b{{{beyond}}}", f"b{{{beyond}}}()"]) == (f"b{{{beyond}}}", 2)


def test_fingerprints_belong_to_languages() -> None:
    def fingerprint(regex: str) -> int:
        return regex_language.read_language(regex, dialect="word_boundary").fingerprint()

    assert all(fingerprint(first) == fingerprint(second) for first, second in SAME)
    names = ["dog", "god", "do", "[0-9]", "[AEIOUaeiou]", "[a-j]", ".*[0-9].*", ".*[AEIOUaeiou].*", "", ".*", "~(.*)"]
    assert len(set(map(fingerprint, names))) == len(names)
