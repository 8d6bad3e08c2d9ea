"""SQL as text: its tokens, and what happens to a query before it runs or is compared."""

import re
from collections.abc import Iterator

# Possessive loops, and quotes that may stay open: linear in the length of whatever a model wrote.
_TOKEN = re.compile(
    r"""
      (?P<blank> \s++ | --[^\n]*+ | /\*(?:[^*]|\*(?!/))*+(?:\*/)? )
    | (?P<quoted> '(?:[^']|'')*+'? | "(?:[^"]|"")*+"? | `(?:[^`]|``)*+`? | \[[^\]]*+\]? )
    | (?P<number> (?:\d++\.?\d*+ | \.\d++)(?:[eE][+-]?\d++)? )
    | (?P<word> \w++ )
    | (?P<symbol> <= | >= | <> | != | == | \|\| | . )
    """,
    re.VERBOSE | re.DOTALL,
)
# What a chat model puts SQL between: three backticks and maybe the name of a language, to three backticks or the end.
_FENCE = re.compile(r"```[^\n`]*+\n((?:[^`]|`(?!``))*+)")
_SPLIT_OPERATORS = (("> =", ">="), ("< =", "<="), ("! =", "!="))
_CURRENT_YEAR = re.compile(r"YEAR\s*\(\s*CURDATE\s*\(\s*\)\s*\)", re.IGNORECASE)


def from_code_fence(response: str) -> str:
    """The text in the first code fence of a response; the response as it is if there is none."""
    found = _FENCE.search(response)
    return found[1].strip() if found else response


def to_execute(sql: str, *, keep_distinct: bool) -> str:
    """What is run for a query: operators without blanks in them, 2020 for the current year, no trailing semicolons.

    Source: taoyds/test-suite-sql-eval, exec_eval.py, the rules of `postprocess`, `replace_cur_year` and
    `remove_distinct`. Semicolons are ours.
    """
    sql = _CURRENT_YEAR.sub("2020", _join_operators(sql)).rstrip("; \t\r\n")
    if keep_distinct:
        return sql
    return "".join(text for _, text in _split(sql) if text.lower() != "distinct")


def to_compare(sql: str) -> list[str]:
    """Tokens of a query in lower case, quoted ones as they are; without white space, comments and semicolons behind."""
    found = [
        text if kind == "quoted" else text.lower() for kind, text in _split(_join_operators(sql)) if kind != "blank"
    ]
    while found and found[-1] == ";":
        found.pop()
    return found


def has_order_by(sql: str) -> bool:
    """Whether ORDER BY stands anywhere in a query, a subquery included."""
    words = to_compare(sql)
    return ("order", "by") in zip(words, words[1:], strict=False)


def _split(sql: str) -> Iterator[tuple[str, str]]:
    for match in _TOKEN.finditer(sql):
        assert match.lastgroup is not None, f"{match} has no kind"
        yield match.lastgroup, match.group()


def _join_operators(sql: str) -> str:
    for split, joined in _SPLIT_OPERATORS:
        sql = sql.replace(split, joined)
    return sql
