"""Scores of predicted SQL."""

import re
import sqlite3
from pathlib import Path

import pytest

from dllm_jepa.errors import DataError
from dllm_jepa.evals.spider import Databases, Limits, from_code_fence, score
from dllm_jepa.evals.spider._sql_text import has_order_by, to_compare, to_execute

ROWS = [(1, "Joe", "US", 52), (2, "Ann", "FR", 32), (3, "Tim", "FR", 32), (4, "Ann", "NL", None)]
GOLD = "SELECT name FROM singer WHERE country = 'FR'"


def make_database(path: Path, rows: list[tuple[int, str, str, int | None]]) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("CREATE TABLE singer (id INTEGER, name TEXT, country TEXT, age INTEGER)")
        connection.executemany("INSERT INTO singer VALUES (?, ?, ?, ?)", rows)
    connection.close()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spider")
    make_database(path / "concert" / "concert.sqlite", ROWS)
    return path


@pytest.fixture(scope="module")
def databases(directory: Path) -> Databases:
    return Databases(directory, ["concert", "concert"], limits=Limits(seconds=5))


def match(prediction: str, gold: str, databases: Databases) -> bool | float | None:
    return score(prediction, {"db_id": "concert", "query": gold}, databases).value


@pytest.mark.parametrize(
    ("gold", "prediction", "expected"),
    [
        (GOLD, GOLD, True),
        (GOLD, 'select T1.name from singer as T1 where T1.country = "FR" order by T1.id desc;', True),
        (GOLD, "SELECT name FROM singer WHERE age > = 32 AND country != 'US' AND age < = 32", True),
        (GOLD, "WITH t AS (SELECT * FROM singer) SELECT name FROM t WHERE country IN ('FR', 'DE')", True),
        (GOLD, "SELECT name FROM singer WHERE country = 'fr'", False),
        (GOLD, "SELECT name, age FROM singer WHERE country = 'FR'", False),
        (GOLD, f"{GOLD}; SELECT 1", False),
        (GOLD, f"{GOLD};;", True),
        ("SELECT name, age FROM singer", "SELECT age, name FROM singer", True),
        ("SELECT name FROM singer ORDER BY id", "SELECT name FROM singer ORDER BY id DESC", False),
        ("SELECT name FROM singer", "SELECT name FROM singer ORDER BY id DESC", True),
        ("SELECT name, id FROM singer ORDER BY id", "SELECT id, name FROM singer ORDER BY id", True),
        ("SELECT count(*) FROM singer", "SELECT 4.0", True),
        ("SELECT count(*) FROM singer", "SELECT '4'", False),
        ("SELECT country, count(*) FROM singer GROUP BY country", "SELECT country, 1 FROM singer", False),
        ("SELECT name FROM singer WHERE 0", "SELECT id, age FROM singer WHERE age > 99", True),
        ("SELECT name FROM singer WHERE 0", "DROP TABLE singer", False),
        ("SELECT name FROM singer WHERE 0", "SELECT name FROM singer WHERE 0; SELECT 1", False),
        ("SELECT YEAR(CURDATE()) - 2000", "SELECT 20", True),
    ],
)
def test_execution_match(databases: Databases, gold: str, prediction: str, expected: bool) -> None:
    assert match(prediction, gold, databases) is expected
    assert match(gold, gold, databases) is True


def test_distinct_counts_only_if_asked_for(directory: Path, databases: Databases) -> None:
    keeping = Databases(directory, ["concert"], keep_distinct=True)
    for gold, prediction in [
        ("SELECT name FROM singer", "SELECT DISTINCT name FROM singer"),
        ("SELECT count(DISTINCT name) FROM singer", "SELECT count(name) FROM singer"),
    ]:
        assert match(prediction, gold, databases) is True
        assert match(prediction, gold, keeping) is False


def test_the_measures_and_the_reason(databases: Databases) -> None:
    row = {"db_id": "concert", "query": GOLD}
    right = score("SELECT name FROM singer WHERE 'FR' = country", row, databases)
    assert (dict(right.measures), right.note) == ({"execution_match": True, "exact_match": False}, "")
    assert list(right.measures) == ["execution_match", "exact_match"]
    assert score(f"\n{GOLD} ;", row, databases).measures == {"execution_match": True, "exact_match": True}
    wrong = score("SELECT name FROM singer", row, databases)
    assert wrong.note == "other rows than the gold query (4, gold 2)"
    assert score("hello", row, databases).note == 'the query cannot run: near "hello": syntax error'


def test_a_gold_that_cannot_run_is_no_measure(databases: Databases) -> None:
    result = score("SELECT 1", {"db_id": "concert", "query": "SELECT x FROM nowhere"}, databases)
    assert result.measures == {"execution_match": None, "exact_match": False}
    assert result.note == "the gold query cannot run on concert: no such table: nowhere"


@pytest.mark.parametrize("letter", ["''a", "/*"])
def test_hundreds_of_thousands_of_characters_are_wrong(databases: Databases, letter: str) -> None:
    assert match(letter * 100_000, GOLD, databases) is False


def test_a_prediction_must_be_right_on_every_file(tmp_path: Path) -> None:
    make_database(tmp_path / "concert" / "concert.sqlite", ROWS)
    lucky = "SELECT name FROM singer WHERE age = 32"
    assert match(lucky, GOLD, Databases(tmp_path, ["concert"])) is True
    make_database(tmp_path / "concert" / "concert_2.sqlite", [*ROWS, (5, "Bob", "UK", 32)])
    assert match(lucky, GOLD, Databases(tmp_path, ["concert"])) is False
    assert match(GOLD, GOLD, Databases(tmp_path, ["concert"])) is True


@pytest.mark.parametrize("prediction", [GOLD, "hello"])
def test_a_gold_that_fails_on_any_file_is_no_measure_whatever_the_prediction(tmp_path: Path, prediction: str) -> None:
    make_database(tmp_path / "concert" / "concert.sqlite", ROWS)
    connection = sqlite3.connect(tmp_path / "concert" / "concert_2.sqlite")
    with connection:
        connection.execute("CREATE TABLE other (id)")
    connection.close()
    result = score(prediction, {"db_id": "concert", "query": GOLD}, Databases(tmp_path, ["concert"]))
    assert result.value is None
    assert result.note == "the gold query cannot run on concert_2: no such table: singer"


def test_no_comparison_is_no_match(databases: Databases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(databases, "files", lambda db_id: [])
    with pytest.raises(ValueError, match="database 'concert' has no files to compare the queries on"):
        match("nonsense", GOLD, databases)


@pytest.mark.parametrize("db_id", ["{outside}", "../outside", "concert/../../outside", "", "..", "a\0b", None])
def test_a_db_id_cannot_leave_the_directory(tmp_path: Path, db_id: str | None) -> None:
    outside = tmp_path / "outside"
    make_database(tmp_path / "inside" / "concert" / "concert.sqlite", ROWS)
    # What the text of such a db_id, put twice into a path, would find.
    for place in (
        outside / "outside.sqlite",
        tmp_path / "inside" / "concert" / "outside.sqlite",
        tmp_path / "outside.sqlite",
    ):
        make_database(place, ROWS)
    db_id = db_id and db_id.format(outside=outside)
    with pytest.raises(DataError, match=rf"inside: db_id {re.escape(repr(db_id))} must be the name of a directory"):
        Databases(tmp_path / "inside", ["concert", db_id])  # type: ignore[list-item]


def test_folders_are_no_files_of_a_database(tmp_path: Path) -> None:
    make_database(tmp_path / "concert" / "concert.sqlite", ROWS)
    (tmp_path / "concert" / "old.sqlite").mkdir()
    (tmp_path / "empty" / "empty.sqlite").mkdir(parents=True)
    assert Databases(tmp_path, ["concert"]).files("concert") == [tmp_path / "concert" / "concert.sqlite"]
    with pytest.raises(DataError, match="lacks 1 of the 2 databases: empty"):
        Databases(tmp_path, ["concert", "empty"])


def test_all_missing_databases_are_named_at_once(directory: Path) -> None:
    with pytest.raises(DataError, match=r"lacks 2 of the 3 databases: a, b; each must be there as <db_id>/<db_id>.sql"):
        Databases(directory, ["b", "concert", "a"])
    with pytest.raises(DataError, match="lacks 1 of the 1"):
        Databases(directory / "nowhere", ["concert"])


def test_a_damaged_database_is_no_wrong_prediction(tmp_path: Path) -> None:
    (tmp_path / "concert").mkdir()
    (tmp_path / "concert" / "concert.sqlite").write_bytes(b"not Spider" * 1000)
    with pytest.raises(DataError, match=r"concert/concert\.sqlite cannot be read: file is not a database"):
        match(GOLD, GOLD, Databases(tmp_path, ["concert"]))


def test_only_databases_that_were_asked_for_are_used(databases: Databases) -> None:
    with pytest.raises(ValueError, match="'other' is not among the 1 databases"):
        databases.files("other")


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("SELECT  count(*)\nFROM t", "select COUNT ( * ) from T ;", True),
        ("SELECT a -- the first\nFROM t", "SELECT a /* it */ FROM t", True),
        ("SELECT a FROM t WHERE b = 'X'", "SELECT a FROM t WHERE b = 'x'", False),
        ("SELECT a FROM t WHERE b = 'x  y'", "SELECT a FROM t WHERE b = 'x y'", False),
        ("SELECT a FROM t WHERE b = 'x'", 'SELECT a FROM t WHERE b = "x"', False),
        ("SELECT ab FROM t", "SELECT a b FROM t", False),
        ("SELECT a FROM t", "SELECT a FROM t; SELECT a FROM t", False),
        ("SELECT 1.5", "SELECT 1 .5", False),
        ("", ";", True),
    ],
)
def test_exact_match_compares_tokens(left: str, right: str, same: bool) -> None:
    assert (to_compare(left) == to_compare(right)) == same


@pytest.mark.parametrize(
    ("sql", "executed"),
    [
        ("SELECT a WHERE b > = 1 AND c < = 2 AND d ! = 3 ;", "SELECT a WHERE b >= 1 AND c <= 2 AND d != 3"),
        ("SELECT year ( curdate( ) ) - 1", "SELECT 2020 - 1"),
        ("SELECT Distinct a", "SELECT  a"),
        ("SELECT 'distinct', \"DISTINCT\", [distinct], distinct_1 -- distinct",) * 2,
    ],
)
def test_the_official_changes_to_a_query(sql: str, executed: str) -> None:
    assert to_execute(sql, keep_distinct=False) == executed


def test_order_by_is_found_outside_quotes() -> None:
    assert has_order_by("SELECT a FROM t ORDER BY a")
    assert has_order_by("select a from (select a from t order\n by b limit 1)")
    assert not has_order_by("SELECT 'order by' FROM t -- order by")
    assert not has_order_by("SELECT a AS orderby FROM t GROUP BY a")


def test_tokens_of_a_query() -> None:
    sql = "SELECT T1.a, 'It''s', 1.5e3 FROM [My t] AS T1 WHERE `x`<>-.5||\"Q\" -- end"
    assert to_compare(sql) == [
        *("select", "t1", ".", "a", ",", "'It''s'", ",", "1.5e3", "from", "[My t]", "as", "t1", "where", "`x`"),
        *("<>", "-", ".5", "||", '"Q"'),
    ]


@pytest.mark.parametrize(
    ("response", "sql"),
    [
        ("SELECT 1", "SELECT 1"),
        ("```sql\nSELECT 1\n```", "SELECT 1"),
        ("```\nSELECT `a`,\n1\n```", "SELECT `a`,\n1"),
        ("So:\n```SQL\nSELECT 1;\n``` or\n```\nSELECT 2\n```", "SELECT 1;"),
        ("```sqlite\nSELECT 1", "SELECT 1"),
        ("SELECT `a` FROM `b`", "SELECT `a` FROM `b`"),
        ("```SELECT 1```", "```SELECT 1```"),
        ("```\n" * 300_000, ""),
        ("`" * 1_000_000, "`" * 1_000_000),
    ],
)
def test_the_query_in_a_code_fence(response: str, sql: str) -> None:
    assert from_code_fence(response) == sql
