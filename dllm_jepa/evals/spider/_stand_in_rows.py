"""Made-up rows for the tables of a database."""

import random
from collections.abc import Mapping, Sequence

from dllm_jepa.evals.spider._gold_constants import Constant
from dllm_jepa.evals.spider._schemas import Schema

# Distinct values of a key. A table with a key of one column has as many rows, or fewer if nothing refers to it and it
# refers to another table; a table without has more, so that rows of other tables have several partners in it.
_KEYS = 60
_ROWS_OF_PARTIAL_TABLE = 42
_ROWS_WITHOUT_KEY = 90
_NULL_SHARE = 0.04

_SYLLABLES = "ba ce do fa ga hu ki lo ma ne po ra si ta ve wi yo zu".split()


def make_rows(
    schema: Schema, constants: Mapping[int, Sequence[Constant]], seed: str
) -> list[list[tuple[Constant, ...]]]:
    """Rows by table.

    Primary keys are unique. Columns that foreign keys connect, over however many tables, share one pool of values; a
    column that is referred to holds all of it, so every foreign key holds, also in a circle.

    Args:
        schema: tables, types and keys.
        constants: values that columns should hold, by the number of the column.
        seed: the same one gives the same rows.
    """
    return [
        _without_repeated_keys(schema, table, list(zip(*columns, strict=True)))
        for table, columns in enumerate(_columns(schema, constants, seed))
    ]


def _columns(schema: Schema, constants: Mapping[int, Sequence[Constant]], seed: str) -> list[list[list[Constant]]]:
    pools = _key_pools(schema, constants, seed)
    referred_to = {parent for _, parent in schema.foreign_keys}
    referring = {child for child, _ in schema.foreign_keys}
    tables = []
    for table in range(len(schema.tables)):
        key = schema.key_of(table)
        if len(key) != 1:
            num_rows = _ROWS_WITHOUT_KEY
        else:
            num_rows = _ROWS_OF_PARTIAL_TABLE if key[0] in referring - referred_to else _KEYS
        columns = []
        for number in schema.columns_of(table):
            draw = random.Random(f"{seed}/column {number}")
            if number not in pools:
                columns.append(_plain_values(schema.columns[number].kind, constants.get(number, ()), num_rows, draw))
            elif number in referred_to or [number] == key:
                columns.append(_covering(pools[number], num_rows, draw))
            else:
                columns.append(_skewed(pools[number], num_rows, draw))
        tables.append(columns)
    return tables


def _without_repeated_keys(schema: Schema, table: int, rows: list[tuple[Constant, ...]]) -> list[tuple[Constant, ...]]:
    """The first row of every key; values that others refer to stay, as they are first met in rows of their own."""
    places = [place for place, number in enumerate(schema.columns_of(table)) if number in schema.primary_key]
    if not places:
        return rows
    first: dict[tuple[str, ...], tuple[Constant, ...]] = {}
    for row in rows:
        first.setdefault(tuple(_as_key(row[place]) for place in places), row)
    return list(first.values())


def _key_pools(schema: Schema, constants: Mapping[int, Sequence[Constant]], seed: str) -> dict[int, list[Constant]]:
    """The values of every key column."""
    group = {number: {number} for number in schema.primary_key}
    for child, parent in schema.foreign_keys:
        joined = group.get(child, {child}) | group.get(parent, {parent})
        group.update(dict.fromkeys(joined, joined))
    pools: dict[int, list[Constant]] = {}
    for members in group.values():
        first = min(members)
        if first in pools:
            continue
        planted = [value for number in sorted(members) for value in constants.get(number, ()) if value is not None]
        is_number = any(schema.columns[number].kind == "number" for number in members)
        pool = _key_pool(planted, is_number, random.Random(f"{seed}/key {first}"))
        pools.update(dict.fromkeys(members, pool))
    return pools


def _key_pool(planted: Sequence[Constant], is_number: bool, draw: random.Random) -> list[Constant]:
    pool: dict[str, Constant] = {}
    for value in planted[:_KEYS]:
        pool.setdefault(_as_key(value), value)
    next_number = 1
    while len(pool) < _KEYS:
        value = next_number if is_number else f"{_word(draw)}{next_number}"
        pool.setdefault(_as_key(value), value)
        next_number += 1
    return list(pool.values())


def _as_key(value: Constant) -> str:
    """The same for values that a column of numbers may take for one: 1, 1.0, "1" and "01"."""
    try:
        return str(float(value if value is not None else ""))
    except ValueError:
        return str(value)


def _covering(pool: Sequence[Constant], num_rows: int, draw: random.Random) -> list[Constant]:
    """Every value of the pool once, in any order, then some again; fewer if there are fewer rows."""
    values = draw.sample(pool, min(num_rows, len(pool)))
    return values + draw.choices(pool, k=num_rows - len(values))


def _skewed(values: Sequence[Constant], num_rows: int, draw: random.Random) -> list[Constant]:
    """Early values more often than late ones, as groups of one size would hide what a query does with them."""
    return draw.choices(values, weights=[1 / (place + 2) for place in range(len(values))], k=num_rows)


def _plain_values(kind: str, planted: Sequence[Constant], num_rows: int, draw: random.Random) -> list[Constant]:
    """Values of a column that is no key: about half of them planted, if there are any to plant."""
    numbers = [value for value in planted if isinstance(value, int | float)]
    texts = [value for value in planted if isinstance(value, str)]
    null_share = 0.2 if None in planted else _NULL_SHARE
    others = _other_numbers(numbers, draw) if kind == "number" else _other_texts(kind, [*texts, *numbers], draw)
    chosen = [*numbers, *texts]
    draw.shuffle(chosen)
    share = min(0.3 + 0.1 * len(chosen), 0.7) if chosen else 0.0
    values: list[Constant] = []
    for _ in range(num_rows):
        if draw.random() < null_share:
            values.append(None)
        else:
            values.extend(_skewed(chosen if draw.random() < share else others, 1, draw))
    return values


def _other_numbers(planted: list[int | float], draw: random.Random) -> list[Constant]:
    """Numbers on both sides of the planted ones."""
    low, high = (min(planted), max(planted)) if planted else (1, 100)
    margin = max(2, (high - low) // 2, abs(high) // 5)
    if all(isinstance(value, int) for value in planted):
        return [draw.randint(int(low - margin), int(high + margin)) for _ in range(24)]
    return [round(draw.uniform(low - margin, high + margin), 2) for _ in range(24)]


def _other_texts(kind: str, planted: list[Constant], draw: random.Random) -> list[Constant]:
    if kind == "boolean":
        return [0, 1]
    dated = [str(value) for value in planted if str(value)[:1].isdecimal()]
    if dated:
        # Dates, times and numbers as text: the like of those that queries compare with.
        return [_with_other_digits(draw.choice(dated), draw) for _ in range(24)]
    if kind == "time":
        return [f"{draw.randint(1990, 2020)}-{draw.randint(1, 12):02}-{draw.randint(1, 28):02}" for _ in range(24)]
    return [_word(draw).capitalize() for _ in range(24)]


def _with_other_digits(text: str, draw: random.Random) -> str:
    """A text with other digits behind its first three places."""
    return text[:3] + "".join(str(draw.randint(0, 9)) if letter.isdecimal() else letter for letter in text[3:])


def _word(draw: random.Random) -> str:
    return "".join(draw.choices(_SYLLABLES, k=3))
