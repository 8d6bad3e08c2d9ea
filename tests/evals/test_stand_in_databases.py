"""Made-up databases in the place of Spider's own."""

import copy
import json
import multiprocessing
import os
import shutil
import sqlite3
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dllm_jepa.errors import DataError
from dllm_jepa.evals.spider import Databases, _stand_in_databases, make_stand_ins, score
from dllm_jepa.evals.spider._gold_constants import find_constants
from dllm_jepa.evals.spider._schemas import read_tables

SHOP: dict[str, Any] = {
    "db_id": "shop",
    "table_names_original": ["customer", "order", "line item", "sqlite_sequence"],
    "column_names_original": [
        [-1, "*"],
        [0, "Customer_ID"],
        [0, "Name"],
        [0, "Born"],
        [0, "Is_member"],
        [0, "boss"],
        [1, "order_id"],
        [1, "customer_id"],
        [1, "Total"],
        [1, "group"],
        [2, "order_id"],
        [2, "%_off (max)"],
        [2, 'say "hi"'],
        [2, "line"],
        [3, "seq"],
    ],
    "column_types": [
        *("text", "number", "text", "time", "boolean", "number"),
        *("text", "text", "number", "text", "number", "number", "others", "number", "number"),
    ],
    "primary_keys": [1, 6, 10, 13],
    "foreign_keys": [[5, 1], [7, 1], [10, 6]],
}
# Keys in a circle; one that is a key of its own table too; one that refers to half a key.
CIRCLE: dict[str, Any] = {
    "db_id": "circle",
    "table_names_original": ["a", "b", "c", "parts", "uses"],
    "column_names_original": [
        *([-1, "*"], [0, "id"], [0, "b"], [1, "id"], [1, "a"], [2, "id"], [2, "note"]),
        *([3, "code"], [3, "part"], [4, "code"]),
    ],
    "column_types": ["text", "number", "text", "text", "number", "number", "text", "text", "number", "text"],
    "primary_keys": [1, 3, 5, 7, 8],
    "foreign_keys": [[2, 3], [4, 1], [5, 1], [9, 7]],
}
GOLDS = {
    "shop": [
        "SELECT name FROM customer WHERE name = 'Ann O''Hara'",
        'SELECT count(*) FROM customer AS T1 WHERE T1.born > "1980-05-06"',
        "SELECT T2.total FROM customer T1 JOIN `order` AS T2 ON T1.boss = T2.customer_id WHERE T1.Name LIKE '%Bo%'",
        'SELECT "group" FROM "order" GROUP BY "group" HAVING count(*) >= 3',
        'SELECT * FROM "order" WHERE total BETWEEN 1000 AND 1200 AND "group" != \'x\'',
        'SELECT * FROM "order" WHERE total < -7.5 OR total = 123456',
        'SELECT "say ""hi""" FROM "line item" WHERE "%_off (max)" IN (10, 20) AND [say "hi"] IS NOT NULL',
        'SELECT name FROM customer WHERE customer_id NOT IN (SELECT customer_id FROM "order")',
        "SELECT name FROM customer WHERE boss = 77 INTERSECT SELECT name FROM customer WHERE born IS NULL OR 1",
        'SELECT customer_id FROM "order" GROUP BY customer_id HAVING count(*) > 1 AND avg(total) > 5',
        "SELECT name FROM customer WHERE customer_id = 4711",
        "SELECT name FROM customer WHERE customer_id = '01' OR customer_id = 1.0",
        "SELECT order_id FROM \"order\" WHERE order_id = 'A-17'",
        "SELECT a.name, b.name FROM customer a JOIN customer b ON a.boss = b.customer_id",
        "SELECT count(*) FROM customer WHERE is_member = 1",
    ],
    "circle": [
        "SELECT c.note FROM a JOIN b ON a.b = b.id JOIN c ON c.id = a.id",
        "SELECT note FROM c WHERE note LIKE 'x_z'",
    ],
}


def write_tables(directory: Path, databases: object) -> Path:
    path = directory / "tables.json"
    path.write_text(json.dumps(databases), encoding="utf-8")
    return path


def rows(directory: Path, db_id: str, sql: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(directory / db_id / f"{db_id}.sqlite")
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def content(directory: Path) -> Mapping[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*.*"))}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tables(tmp_path_factory.mktemp("tables"), [SHOP, CIRCLE])


@pytest.fixture(scope="module")
def made(tables: Path) -> Path:
    return make_stand_ins(tables, tables.parent / "made", golds=GOLDS, seed=3)


@pytest.mark.parametrize(("db_id", "gold"), [(db_id, gold) for db_id, golds in GOLDS.items() for gold in golds])
def test_every_gold_gives_rows_and_matches_itself(made: Path, db_id: str, gold: str) -> None:
    databases = Databases(made, GOLDS)
    assert databases.are_stand_ins
    assert databases.execute(gold, databases.files(db_id)[0]).rows
    assert score(gold, {"db_id": db_id, "query": gold}, databases).value is True


def test_wrong_constants_give_other_rows(made: Path) -> None:
    databases = Databases(made, ["shop"])
    for right, wrong in [("BETWEEN 1000 AND 1200", "BETWEEN 1001 AND 1200"), ("total < -7.5", "total <= 7.5")]:
        gold = next(gold for gold in GOLDS["shop"] if right in gold)
        assert score(gold.replace(right, wrong), {"db_id": "shop", "query": gold}, databases).value is False


def test_keys_hold(made: Path) -> None:
    for db_id, table, key in [
        ("shop", "customer", "Customer_ID"),
        ("shop", "order", "order_id"),
        ("circle", "a", "id"),
        ("circle", "b", "id"),
        ("circle", "c", "id"),
    ]:
        (counts,) = rows(made, db_id, f'SELECT count(*), count(DISTINCT {key}) FROM "{table}"')
        assert counts[0] == counts[1] >= 36
    (counts,) = rows(made, "shop", 'SELECT count(*) FROM (SELECT DISTINCT order_id, line FROM "line item")')
    assert counts == rows(made, "shop", 'SELECT count(*) FROM "line item"')[0] >= (36,)
    for db_id, child, column, parent, key in [
        ("shop", "customer", "boss", "customer", "Customer_ID"),
        ("shop", "order", "customer_id", "customer", "Customer_ID"),
        ("shop", "line item", "order_id", "order", "order_id"),
        ("circle", "a", "b", "b", "id"),
        ("circle", "b", "a", "a", "id"),
        ("circle", "c", "id", "a", "id"),
        ("circle", "uses", "code", "parts", "code"),
    ]:
        parents = f'SELECT 1 FROM "{parent}" AS parent WHERE parent.{key} = child.{column}'
        assert rows(made, db_id, f'SELECT * FROM "{child}" AS child WHERE NOT EXISTS ({parents})') == []


def test_some_keys_have_no_partner_and_some_have_many(made: Path) -> None:
    numbers = rows(
        made,
        "shop",
        'SELECT count(b.order_id) FROM "order" AS a LEFT JOIN "line item" AS b ON a.order_id = b.order_id '
        "GROUP BY a.order_id",
    )
    assert min(numbers) == (0,) and max(numbers) >= (4,)


def test_columns_are_those_of_the_tables(made: Path) -> None:
    names = rows(made, "shop", "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
    assert names == [("customer",), ("line item",), ("order",)]
    columns = rows(made, "shop", "SELECT name, type FROM pragma_table_info('line item')")
    assert columns == [("order_id", "NUMERIC"), ("%_off (max)", "NUMERIC"), ('say "hi"', "TEXT"), ("line", "NUMERIC")]


def test_a_seed_makes_the_same_bytes(tables: Path, made: Path, tmp_path: Path) -> None:
    reordered = {db_id: list(reversed(GOLDS[db_id])) for db_id in reversed(GOLDS)}
    again = make_stand_ins(tables, tmp_path, golds=reordered, seed=3)
    other = make_stand_ins(tables, tmp_path, golds=GOLDS, seed=4)
    assert again.name == made.name and content(again) == content(made)
    assert content(other).keys() == content(made).keys()
    for name in ("shop/shop.sqlite", "circle/circle.sqlite"):
        assert content(other)[name] != content(made)[name]


def test_what_is_made_is_left_as_it_is(tables: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stand_in_databases, "_make_database", None)
    assert make_stand_ins(tables, made.parent, golds=GOLDS, seed=3) == made


@pytest.mark.parametrize(
    ("seed", "golds", "others"),
    [(4, GOLDS, []), (3, {"shop": GOLDS["shop"]}, []), (3, GOLDS | {"shop": GOLDS["shop"][:1]}, []), (3, GOLDS, [1])],
    ids=["seed", "databases", "queries", "tables"],
)
def test_stand_ins_of_several_inputs_live_side_by_side(
    made: Path, tmp_path: Path, seed: int, golds: Mapping[str, Sequence[str]], others: list[int]
) -> None:
    changed = copy.deepcopy(SHOP)
    for number in others:
        changed["column_types"][number] = "text"
    before = content(made)
    beside = make_stand_ins(write_tables(tmp_path, [changed, CIRCLE]), made.parent, golds=golds, seed=seed)
    assert beside != made and beside.parent == made.parent
    assert Databases(beside, golds).are_stand_ins
    assert content(made) == before


def test_something_else_is_not_touched(tables: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.unfinished-1").write_text("mine")
    folder = make_stand_ins(tables, tmp_path, golds=GOLDS)
    assert not _stand_in_databases.is_stand_in(tmp_path)
    (folder / "stand_ins.json").write_text("mine")
    before = content(tmp_path)
    with pytest.raises(DataError, match=rf"cannot be made: .*{folder.name} holds something else; remove it"):
        make_stand_ins(tables, tmp_path, golds=GOLDS)
    with pytest.raises(DataError, match=r"cannot be made in .*notes.unfinished-1: File exists; name another"):
        make_stand_ins(tables, tmp_path / "notes.unfinished-1", golds=GOLDS)
    assert content(tmp_path) == before


def test_missing_parents_and_an_empty_folder_will_do(tables: Path, tmp_path: Path) -> None:
    for _ in range(2):
        folder = make_stand_ins(tables, tmp_path / "a" / "b", golds={"circle": GOLDS["circle"]})
        assert (folder / "circle" / "circle.sqlite").is_file()
        assert folder.stat().st_mode & 0o777 == 0o755
        shutil.rmtree(folder)
        folder.mkdir()


def test_a_maker_that_is_stopped_leaves_nothing(tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_one = _stand_in_databases._make_database

    def stop_at_second(directory: Path, *rest: Any) -> None:
        if directory.name == "shop":
            raise KeyboardInterrupt
        make_one(directory, *rest)

    monkeypatch.setattr(_stand_in_databases, "_make_database", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        make_stand_ins(tables, tmp_path, golds=GOLDS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_made", [False, True])
def test_what_a_killed_maker_left_is_removed_later(tables: Path, tmp_path: Path, is_made: bool) -> None:
    if is_made:
        make_stand_ins(tables, tmp_path, golds=GOLDS)
    old, new, foreign = (
        tmp_path / name for name in (f"{'0a' * 8}.unfinished-x", f"{'0a' * 8}.unfinished-y", "my.unfinished-x")
    )
    for folder, hours in ((old, 2), (new, 0), (foreign, 2)):
        (folder / "shop").mkdir(parents=True)
        os.utime(folder, (time.time() - hours * 3600,) * 2)
    folder = make_stand_ins(tables, tmp_path, golds=GOLDS)
    assert sorted(tmp_path.iterdir()) == sorted([folder, new, foreign])


def test_the_slower_of_two_makers_takes_what_the_faster_made(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes that make everything, and then give it its name at one moment."""
    processes = multiprocessing.get_context("fork")
    both, names = processes.Barrier(2, timeout=60), processes.SimpleQueue()
    publish = _stand_in_databases.publish
    monkeypatch.setattr(_stand_in_databases, "publish", lambda *folders: (both.wait(), publish(*folders)))
    makers = [
        processes.Process(target=lambda: names.put(make_stand_ins(tables, tmp_path, golds=GOLDS, seed=3).name))
        for _ in range(2)
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(60)
    assert [maker.exitcode for maker in makers] == [0, 0]
    (folder,) = tmp_path.iterdir()
    assert names.get() == names.get() == folder.name
    assert len(rows(folder, "circle", "SELECT * FROM a")) >= 36


def test_databases_without_tables_are_named(tables: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tables\.json lacks 2 databases: x, y"):
        make_stand_ins(tables, tmp_path / "made", golds={"y": [], "shop": [], "x": []})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"db_id": "../shop"}, "must be the name of a directory"),
        ({"db_id": ""}, "must be the name of a directory"),
        ({"db_id": None}, "must be the name of a directory"),
        ({"db_id": "circle"}, "'circle' was there before"),
        ({"foreign_keys": [[1, 99]]}, "names column 99; there are 1 to 14"),
        ({"primary_keys": [0]}, "names column 0"),
        ({"foreign_keys": [[1]]}, "ValueError"),
        ({"foreign_keys": None}, "TypeError"),
        ({"column_types": ["text"]}, "ValueError"),
        ({"table_names_original": ["customer", "order", "Customer", "d"]}, "two tables have one name"),
        ({"table_names_original": ["a", "b", "c", "d", "e"]}, "table 'e' has no columns"),
        ({"table_names_original": ["a", "b", "c"]}, "a column is of no table"),
        ({"column_names_original": [[-1, "*"], [0, "a"], [0, "A"]], "column_types": ["text"] * 3}, "have one name"),
        ({"column_names_original": [[-1, "*"], [0, 5]], "column_types": ["text"] * 2}, "must be text"),
        ({"table_names_original": ["customer", "", "c", "d"]}, "names of tables must be text"),
    ],
)
def test_malformed_tables_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_tables(tmp_path, [CIRCLE, SHOP | changes])
    with pytest.raises(DataError, match=rf"tables\.json: database 1 is not of Spider's form .*({message})"):
        read_tables(path)


@pytest.mark.parametrize("key", SHOP)
def test_missing_parts_are_refused(tmp_path: Path, key: str) -> None:
    path = write_tables(tmp_path, [{name: value for name, value in SHOP.items() if name != key}])
    with pytest.raises(DataError, match=f"database 0 is not of Spider's form .KeyError: '{key}'.; it needs db_id"):
        read_tables(path)


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tables.json"
    with pytest.raises(DataError, match=r"tables\.json cannot be read: No such file"):
        read_tables(path)
    for text, message in [
        ("{", "is not JSON"),
        ("{}", "must hold a list"),
        ("[1]", "TypeError"),
        ("[[]]", "TypeError"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_tables(path)


@pytest.mark.parametrize(
    ("condition", "column", "values"),
    [
        ("name = 'x'", 1, ["x"]),
        ("name != \"it''s\"", 1, ["it''s"]),
        ("T1.Total > 5", 7, [5, 6]),
        ("T1.total <= -2.5", 7, [-2.5, -3.5]),
        ("total <> 3 AND total == 4", 7, [3, 4]),
        ("total BETWEEN 1 AND .5", 7, [1, 0.5]),
        ("total NOT IN (1, 2)", 7, [1, 2]),
        ("avg(T1.total) >= 10", 7, [10, 11]),
        ("customer.name NOT LIKE '%a_c%'", 1, ["aac"]),
        ("born IS NOT NULL", 2, [None]),
        ("`group` = '7'", 8, ["7"]),
        ("T1.group = 7", 8, [7]),
    ],
)
def test_constants_go_to_their_columns(tables: Path, condition: str, column: int, values: list[Any]) -> None:
    schema = read_tables(tables)["shop"]
    query = f"SELECT * FROM customer JOIN 'order' AS T1 WHERE {condition}"
    found = find_constants(schema, [query, query])
    # 5 and 5.0 are written differently.
    assert repr(found) == repr({column: values})


@pytest.mark.parametrize(
    "condition",
    [
        "count(*) > 5",
        "total = 1" + "0" * 5000,
        "total > 1e999",
        "T2.name = 'x'",
        "seq = 1",
        "= 3",
        "name =",
        "name IN",
        "name LIKE",
        "total BETWEEN 1",
        "name = -",
    ],
)
def test_what_names_no_column_plants_nothing(tables: Path, condition: str) -> None:
    found = find_constants(
        read_tables(tables)["shop"], [f"SELECT * FROM customer JOIN 'order' AS T1 WHERE {condition}"]
    )
    assert found == ({7: [1]} if "BETWEEN" in condition else {})
