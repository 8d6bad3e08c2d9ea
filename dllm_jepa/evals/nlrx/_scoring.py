"""Scores of regexes: does the predicted one match the same lines as the gold one?"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dllm_jepa.errors import DataError
from dllm_jepa.evals._task import Score
from dllm_jepa.evals.nlrx._regex_language import Language, read_language
from dllm_jepa.evals.nlrx._regex_syntax import Dialect, RegexSyntaxError
from dllm_jepa.evals.nlrx._regex_terms import RegexTooLargeError


def equivalent(regex: str, other: str, *, dialect: Dialect = "word_boundary") -> bool:
    r"""Whether two regexes match the same lines, as a whole; never raises, whatever the two texts are.

    Lines are texts of any characters; all characters but TAB and 0x20-0x7e count as one and the same, which is no word
    character. Each regex has to be one that can be read within the bounds: one that is not equals nothing, itself
    included. The bounds (1,000 characters, repeats of 64, nesting of 64 operators, and a number of operations that
    takes below a second) do not depend on the speed of the machine. `_regex_syntax` describes the dialect: by
    `word_boundary` `\b` is a zero-width word boundary, by `brics` a literal b.

    Raises:
        ValueError: there is no such dialect.
    """
    try:
        return read_language(regex, dialect=dialect).equals(read_language(other, dialect=dialect))
    except (RegexSyntaxError, RegexTooLargeError):
        return False


def is_empty(regex: str, *, dialect: Dialect = "word_boundary") -> bool:
    """Whether a regex matches no line at all.

    Raises:
        ValueError: the text is no regex or one that is too large.
    """
    return read_language(regex, dialect=dialect).is_empty


def gold_regex(row: Mapping[str, Any], *, dialect: Dialect = "word_boundary") -> str:
    """The gold regex, `regex` of a row, without the white space at its ends.

    Raises:
        DataError: it is no regex or one that is too large; no prediction could match it.
    """
    return _gold(row, dialect)[0]


def score(prediction: str, row: Mapping[str, Any], *, dialect: Dialect = "word_boundary") -> Score:
    """Compare a predicted regex with `regex` of a row; white space at the ends is no part of either.

    Returns:
        `functional_match`, whether both match the same lines; `exact_match`, whether they are the same text; and
        `functional_match_nonempty`, the first one, or None if the gold regex matches no line.

    Raises:
        DataError: the gold regex is none or too large.
    """
    gold, language = _gold(row, dialect)
    predicted, note = prediction.strip(), ""
    try:
        is_match = read_language(predicted, dialect=dialect).equals(language)
    except RegexSyntaxError as error:
        is_match, note = False, f"unparsable: {error}"
    except RegexTooLargeError as error:
        is_match, note = False, f"too large: {error}"
    measures = {
        "functional_match": is_match,
        "exact_match": predicted == gold,
        "functional_match_nonempty": None if language.is_empty else is_match,
    }
    return Score(measures, note)


def best_constant(regexes: Sequence[str], *, dialect: Dialect = "word_boundary") -> tuple[str, int]:
    """The one answer that would be right most often for gold regexes, and how often.

    Returns:
        The shortest text of the language that occurs most often, and the number of its occurrences; of several such
        languages the one that occurs first.

    Raises:
        ValueError: there is no regex, or some text is none or too large.
    """
    if not regexes:
        raise ValueError("there is no regex")
    # By fingerprint: each language with its regexes, as often as they occur.
    buckets: dict[int, list[tuple[Language, list[str]]]] = {}
    for regex, times in Counter(regexes).items():
        language = read_language(regex, dialect=dialect)
        bucket = buckets.setdefault(language.fingerprint(), [])
        texts = next((texts for other, texts in bucket if other.equals(language)), None)
        if texts is None:
            texts = []
            bucket.append((language, texts))
        texts += [regex] * times
    largest = max((texts for bucket in buckets.values() for _, texts in bucket), key=len)
    return min(largest, key=len), len(largest)


def _gold(row: Mapping[str, Any], dialect: Dialect) -> tuple[str, Language]:
    gold = row["regex"].strip()
    try:
        return gold, read_language(gold, dialect=dialect)
    except (RegexSyntaxError, RegexTooLargeError) as error:
        raise DataError(f"field 'regex' is {gold[:80]!r}, which cannot be compared: {error}; remove the row") from error
