"""Whether a predicted query gives what the gold query gives."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dllm_jepa.errors import DataError
from dllm_jepa.evals._task import Score
from dllm_jepa.evals.spider._result_match import same_result
from dllm_jepa.evals.spider._sandbox import Limits, Result, Sandbox
from dllm_jepa.evals.spider._sql_text import has_order_by, to_compare, to_execute

DOWNLOAD = (
    "Spider's databases come with its download, https://yale-lily.github.io/spider: unpack it and set task.databases "
    "to its folder `database`"
)
_NUM_NAMED = 10


class Databases:
    """The SQLite files that queries run on, in Spider's layout: `{directory}/{db_id}/{db_id}.sqlite`.

    Other `.sqlite` files beside that one are used too, as in the official test suites: a prediction must be right on
    all of them.

    Args:
        db_ids: the databases that will be asked for.
        keep_distinct: leave DISTINCT in the queries; the official evaluation takes it out of gold and prediction, and
            so do we unless this is set.

    Raises:
        DataError: databases are missing (the message names the first ones), or a `db_id` is no name of a directory.
    """

    def __init__(
        self, directory: Path, db_ids: Iterable[str], *, limits: Limits | None = None, keep_distinct: bool = False
    ) -> None:
        """Find the files."""
        wanted = sorted(set(db_ids), key=str)
        for db_id in wanted:
            if not isinstance(db_id, str) or db_id in ("", ".", "..") or Path(db_id).name != db_id or "\0" in db_id:
                raise DataError(
                    f"a row names no database of {directory}: db_id {db_id!r} must be the name of a directory"
                )
        self._files = {
            db_id: sorted(file for file in (directory / db_id).glob("*.sqlite") if file.is_file()) for db_id in wanted
        }
        missing = [db_id for db_id in wanted if directory / db_id / f"{db_id}.sqlite" not in self._files[db_id]]
        if missing:
            there = "" if directory.is_dir() else ", which does not exist,"
            more = "" if len(missing) <= _NUM_NAMED else f" and {len(missing) - _NUM_NAMED} more"
            raise DataError(
                f"databases directory {directory}{there} lacks {len(missing)} of the {len(wanted)} databases: "
                f"{', '.join(missing[:_NUM_NAMED])}{more}; each must be there as <db_id>/<db_id>.sqlite. {DOWNLOAD}"
            )
        self.keep_distinct = keep_distinct
        self._sandbox = Sandbox(limits)

    def files(self, db_id: str) -> list[Path]:
        """The files of a database, one at least."""
        if db_id not in self._files:
            raise ValueError(f"db_id {db_id!r} is not among the {len(self._files)} databases that were asked for")
        return self._files[db_id]

    def execute(self, sql: str, file: Path) -> Result:
        """Run a query on a file, after the official changes to its text; see `Sandbox.execute`."""
        return self._sandbox.execute(to_execute(sql, keep_distinct=self.keep_distinct), file)


def score(prediction: str, row: Mapping[str, Any], databases: Databases) -> Score:
    """Run a prediction and `query` of a row on the database `db_id` of the row, and compare what they give.

    `execution_match` follows the official test-suite evaluation: the rows are the same, each as often, under some
    order of the columns; their order counts only if the gold query has ORDER BY; a prediction that fails is wrong. It
    is None if the gold query itself cannot run on all files, as the row then tells nothing about the prediction.
    `exact_match` compares the queries as tokens: white space, comments, trailing semicolons, and case outside quotes do
    not count. The note says why a prediction is wrong.

    A gold query that takes nearly as long as the limits allow may run on one machine and not on another, so the number
    of rows with a score may differ between them; on one machine it never depends on the predictions.

    Where the official evaluation takes DISTINCT out of a prediction, it also drops all behind its first statement and
    so accepts `SELECT 1; SELECT 2` for `SELECT 1`; here more than one statement is wrong.

    Raises:
        DataError: the database is damaged; the message names it.

    Source: taoyds/test-suite-sql-eval, exec_eval.py, the rules of `eval_exec_match` with the options as they are
    unless set (Zhong et al. 2020, "Semantic Evaluation for Text-to-SQL with Distilled Test Suites").
    """
    gold = row["query"]
    match, note = _execution_match(prediction, gold, row["db_id"], databases)
    return Score({"execution_match": match, "exact_match": to_compare(prediction) == to_compare(gold)}, note)


def _execution_match(prediction: str, gold: str, db_id: str, databases: Databases) -> tuple[bool | None, str]:
    files = databases.files(db_id)
    if not files:
        raise ValueError(f"database {db_id!r} has no files to compare the queries on")
    # The gold query first, on all of them: whether a row counts must not depend on where the prediction fails.
    wanted = []
    for file in files:
        result = databases.execute(gold, file)
        if result.rows is None:
            return None, f"the gold query cannot run on {file.stem}: {result.failure}"
        wanted.append(result.rows)
    for file, rows in zip(files, wanted, strict=True):
        found = databases.execute(prediction, file)
        if found.rows is None:
            return False, f"the query cannot run: {found.failure}"
        if not same_result(rows, found.rows, ordered=has_order_by(gold)):
            return False, f"other rows than the gold query ({len(found.rows)}, gold {len(rows)})"
    return True, ""
