"""The dialect: what binds how, what the atoms are, and what is no regex."""

import string

import pytest

from dllm_jepa.evals.nlrx import equivalent, is_empty
from dllm_jepa.evals.nlrx._regex_language import read_language
from dllm_jepa.evals.nlrx._regex_syntax import MAX_LENGTH, Dialect, RegexSyntaxError
from dllm_jepa.evals.nlrx._regex_terms import RegexTooLargeError, symbol

PRINTABLE = [chr(code) for code in range(0x20, 0x7F)]
CHARACTERS = ["\t", *PRINTABLE, "\n", "\x00", "\x7f", "\u00e9", "\u0663", "\ud800", "\U0001f600"]
OTHERS = set(CHARACTERS[96:])


def members(regex: str, dialect: Dialect = "word_boundary") -> set[str]:
    """The characters that are lines of a regex."""
    language = read_language(regex, dialect=dialect)
    return {
        character
        for character in CHARACTERS
        if any(mask & symbol(character) and language.accepting[state] for mask, state in language.moves[0])
    }


def test_precedence() -> None:
    for regex, same, other in [
        ("a|b&c", "a|(b&c)", "(a|b)&c"),
        ("ab|cd", "(ab)|(cd)", "a(b|c)d"),
        (".a&b.", "(.a)&(b.)", ".(a&b)."),
        ("a|bc", "a|(bc)", "(a|b)c"),
        ("ab*", "a(b*)", "(ab)*"),
        ("ab{2}", "abb", "abab"),
        ("~ab", "(~a)b", "~(ab)"),
        ("~(a)(b)", "(~a)b", "~(ab)"),
        ("~(.*)a", "(~(.*))a", "~(.*a)"),
        ("~a*", "(~a)*", "~(a*)"),
        ("~a{2}", "(~a)(~a)", "~(aa)"),
        ("~~a", "a", "~a"),
        ("~[ab]|c", "(~[ab])|c", "~([ab]|c)"),
        ("a~b", "a(~b)", "~(ab)"),
        ("a+?", "a*", "a+"),
        ("a{2}{3}", "a{6}", "a{5}"),
        ("(a{2,3}){2}", "a{4,6}", "a{4,5}"),
    ]:
        assert equivalent(regex, same) and not equivalent(regex, other), regex


@pytest.mark.parametrize(
    ("regex", "expected"),
    [
        (".", set(CHARACTERS)),
        ("[b-d]", {"b", "c", "d"}),
        ("[^a]", set(CHARACTERS) - {"a"}),
        ("[-a]", {"-", "a"}),
        ("[a-c-]", {"a", "b", "c", "-"}),
        ("[]a]", {"]", "a"}),
        ("[^]a]", set(CHARACTERS) - {"]", "a"}),
        (r"[\]\-\\]", {"]", "-", "\\"}),
        (r"[\d_]", {*string.digits, "_"}),
        (r"[\d-z]", {*string.digits, "-", "z"}),
        ("[|&~(){}*+?.]", set("|&~(){}*+?.")),
        (r"\d", set(string.digits)),
        (r"\w", {*string.ascii_letters, *string.digits, "_"}),
        (r"\s", {" ", "\t"}),
        (r"\D", set(CHARACTERS) - set(string.digits)),
        (r"\W", set(CHARACTERS) - {*string.ascii_letters, *string.digits, "_"}),
        (r"\S", set(CHARACTERS) - {" ", "\t"}),
        ("[\t-~]", set(CHARACTERS)),
        ("[ -~]", set(PRINTABLE)),
        ("[^\t -~]", OTHERS),
        ("[~-\u00e9]", {"~", *OTHERS}),
        ("\u00e9", OTHERS),
    ],
)
def test_atoms(regex: str, expected: set[str]) -> None:
    assert members(regex) == expected


def test_characters_that_are_themselves() -> None:
    for character in set(PRINTABLE) - set("bdwsDWS"):
        assert members("\\" + character) == {character}
    for character in "]}#@\"<>^$'/-,:!":
        assert members(character) == {character}


def test_the_empty_string() -> None:
    for regex in ["", "()", "(())", "()()", "()*", "(){3}", "a{0}", "a{0,0}", "(|)", "()&()", "|", "&", "a*&"]:
        assert equivalent(regex, "") and not equivalent(regex, "."), regex
    assert equivalent("(a|)", "a?") and equivalent("|a", "a?") and is_empty("a&")


@pytest.mark.parametrize(
    ("regex", "message"),
    [
        ("*", "nothing to repeat at character 0"),
        ("a~*", "nothing to repeat"),
        ("~", "a ~ without an operand"),
        ("(", r"a \( without \)"),
        ("(a))", r"a \) without \( at character 3"),
        ("[", r"a \[ without \]"),
        ("[a-", r"a \[ without \]"),
        ("[b-a]", "a range from more to less"),
        (r"[a-\d]", "a range from more to less"),
        (r"[\b]", "a word boundary between"),
        ("\\", r"nothing behind \\"),
        ("a{", r"not \{n\}"),
        ("a{,2}", r"not \{n\}"),
        ("a{\u0663}", r"not \{n\}"),
        ("a{" + "1" * 5 + "}", r"not \{n\}"),
        ("a{65}", "a repeat above 64"),
        ("a{3,2}", "a repeat from more to less"),
        ("a" * 1001, "1001 characters, more than 1000"),
    ],
)
def test_what_is_no_regex(regex: str, message: str) -> None:
    with pytest.raises(RegexSyntaxError, match=message):
        read_language(regex, dialect="word_boundary")
    assert not equivalent(regex, regex) and not equivalent(regex, "a") and not equivalent("a", regex)


def test_what_is_just_within_the_bounds() -> None:
    assert equivalent("a{64}", "a" * 64) and equivalent("a{0,64}", "(a?){64}") and equivalent("a{064}", "a{64}")
    assert equivalent("a" * MAX_LENGTH, "a" * MAX_LENGTH) and not equivalent("a" * MAX_LENGTH, "a" * (MAX_LENGTH - 1))
    assert equivalent("(" * 499 + "a" + ")" * 499, "a")
    nested = "a"
    for _ in range(31):
        nested = f"({nested}b)*"
    assert equivalent(nested, nested)
    with pytest.raises(RegexTooLargeError, match="nested deeper than 64 operators"):
        read_language(f"({nested}b)*", dialect="word_boundary")


def test_brics_has_no_word_boundary() -> None:
    assert equivalent(r"\b[\b]", "bb", dialect="brics")
    assert not equivalent(r"\b", "b") and not equivalent(r".*\bdog", ".*bdog")
    assert is_empty(r"(.*)dog\bs") and not is_empty(r"(.*)dog\bs", dialect="brics")
    with pytest.raises(ValueError, match="dialect must be one of word_boundary, brics, got 'perl'"):
        equivalent("a", "a", dialect="perl")  # type: ignore[arg-type]
