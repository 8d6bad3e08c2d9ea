"""The vocabulary of the built-in tokenizer: pieces beside the single bytes, which make any text possible.

A word stands with the blank in front of it, as inside a sentence; words that also stand at the start of a description
or inside a regex are listed without it as well.
"""

MASK_TOKEN = "<|mask|>"
EOS_TOKEN = "<|endoftext|>"
BOS_TOKEN = "<|startoftext|>"
END_OF_TURN_TOKEN = "<|end|>"
ROLE_TOKENS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL_TOKENS = (MASK_TOKEN, EOS_TOKEN, BOS_TOKEN, END_OF_TURN_TOKEN, *ROLE_TOKENS.values())

_COUNTS = "0123456789"
REGEX_PIECES = (
    ".*",
    "[0-9]",
    "[A-Z]",
    "[a-z]",
    "[A-Za-z]",
    "[AEIOUaeiou]",
    "[AEIOU]",
    "[.,;:!?]",
    "[b-df-hj-np-tv-z]",
    r"\b",
    r"\d",
    r"\s",
    r"\w",
    *(f"{{{count}}}" for count in _COUNTS),
    *(f"{{{count},}}" for count in _COUNTS),
)

# Fixed words of the regex tasks: in the description with a blank, in the regex without.
REGEX_WORDS = tuple("dog truck ring lake bird stone chair moon fish house tree glass".split())

# The other words of descriptions, of the built-in pairs and of NL-RX.
DESCRIPTION_WORDS = tuple(
    """
    a and any as at least be before beginning blank both but by capital character comes consisting consonant contain
    containing copies digit directly either ending exactly false finishing first followed have having is it last
    letter line lines lower-case made mark more neither no nor not nothing number occurs occurs of on once one only or
    punctuation right row rows starting string text than that the there times unless vowel where with word words zero
    after
    """.split()
)

# Frequent words of questions, SQL and Python, so that other tasks do not fall apart into single characters.
COMMON_WORDS = tuple(
    """
    an are argument arguments average be call called can class count customer customers default department dictionary
    did do does each empty every find for from function get has he her his how if import in into list many method much
    name names new None per result return self she some student students substitute sum they this to total value was
    what which who will year you FROM SELECT WHERE GROUP ORDER BY JOIN AS ON AND T1 T2 COUNT DISTINCT LIMIT DESC
    """.split()
)
COMMON_PIECES = (
    *"ed er es in ing is ly on re th tion un an ar al en le or st te".split(),
    *(" = ", " ( ", " )", " , ", " . ", " '", ", ", ". ", " (", "  ", "T1.", "T2.", "\n\n"),
)

PIECES = tuple(
    dict.fromkeys(
        (
            *REGEX_PIECES,
            *REGEX_WORDS,
            "lines",
            "rows",
            *(f" {word}" for word in (*REGEX_WORDS, *DESCRIPTION_WORDS, *_COUNTS, *COMMON_WORDS)),
            *COMMON_PIECES,
        )
    )
)
