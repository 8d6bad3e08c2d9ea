"""The constants that queries compare columns with."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from dllm_jepa.evals.spider._schemas import Schema
from dllm_jepa.evals.spider._sql_text import tokens

Constant = None | int | float | str

_COMPARISONS = {"=", "==", "!=", "<>", "<", ">", "<=", ">=", "like", "in", "between", "is"}


def find_constants(schema: Schema, queries: Iterable[str]) -> dict[int, list[Constant]]:
    """Values that make the conditions of queries true or false.

    A rough reading: of `column comparison constant` in this order, also with a function around the column, with the
    names of tables resolved for a query as a whole.

    Args:
        schema: the tables that the queries are about.
        queries: SQL.

    Returns:
        By the number of the column, distinct values in the order in which they were found. For `< 5` 4 is one too,
        for `> 5` 6, and a pattern gives a text that it matches.
    """
    found: dict[int, dict[Constant, None]] = defaultdict(dict)
    for query in queries:
        query_tokens = tokens(query)
        names = _tables(schema, query_tokens)
        for place, token in enumerate(query_tokens):
            if token.lower() in _COMPARISONS:
                values = list(_values(token.lower(), query_tokens[place + 1 :]))
                for column in _columns(schema, names, query_tokens[:place]) if values else ():
                    found[column].update(dict.fromkeys(values))
    return {column: list(values) for column, values in found.items()}


def _tables(schema: Schema, query: list[str]) -> Mapping[str, set[int]]:
    """Tables by what the query calls them; all of its tables under ""."""
    numbers = {name.lower(): number for number, name in enumerate(schema.tables)}
    names: dict[str, set[int]] = defaultdict(set)
    for place, token in enumerate(query):
        number = numbers.get(_unquote(token).lower())
        if number is None or query[max(place - 1, 0)].lower() not in ("from", "join", ","):
            continue
        # Without an alias, what follows is a word that stands in front of no column.
        after = [following.lower() for following in query[place + 1 : place + 3] if following.lower() != "as"]
        for name in (_unquote(token).lower(), *after[:1], ""):
            names[name].add(number)
    return names


def _columns(schema: Schema, names: Mapping[str, set[int]], before: list[str]) -> Iterator[int]:
    """The columns that the name in front of a comparison may mean."""
    # Behind the name may stand NOT, and the bracket of a function.
    while before and before[-1].lower() in ("not", ")"):
        before = before[:-1]
    if not before:
        return
    qualifier = _unquote(before[-3]).lower() if before[-2:-1] == ["."] and len(before) > 2 else ""
    name = _unquote(before[-1]).lower()
    for number, column in enumerate(schema.columns):
        if column.table in names.get(qualifier, ()) and column.name.lower() == name:
            yield number


def _values(comparison: str, after: list[str]) -> Iterator[Constant]:
    if comparison == "is":
        yield None
    elif comparison == "in":
        closing = after.index(")") if ")" in after else len(after)
        for token in after[1:closing]:
            yield from _constant(token)
    elif comparison == "like":
        for value in _constant(after[0] if after else ""):
            yield str(value).replace("%", "").replace("_", "a")
    elif after[:1] == ["-"]:
        for value in _constant(after[1] if len(after) > 1 else ""):
            yield from _around(comparison, -value if isinstance(value, int | float) else value)
    else:
        for token in (after[0], after[2]) if comparison == "between" and len(after) > 2 else after[:1]:
            for value in _constant(token):
                yield from _around(comparison, value)


def _around(comparison: str, value: Constant) -> Iterator[Constant]:
    yield value
    if isinstance(value, int | float) and comparison[0] in "<>" and comparison != "<>":
        yield value + 1 if comparison[0] == ">" else value - 1


def _constant(token: str) -> Iterator[int | float | str]:
    """The value of a token that is a constant."""
    if token[:1] in ("'", '"'):
        yield _unquote(token)
    elif token[:1].isdecimal() or (token[:1] == "." and len(token) > 1):
        number = float(token)
        # Beyond that, not every integer has a float of its own; no column holds such numbers.
        if abs(number) < 2**53:
            yield number if set(token.lower()) & set(".e") else int(token)


def _unquote(token: str) -> str:
    quote = token[:1]
    return token[1:-1].replace(quote * 2, quote) if quote in ("'", '"', "`", "[") and quote else token
