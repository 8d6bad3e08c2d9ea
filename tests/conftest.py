"""The order of the tests: files that start processes come first, lest a worker be left alone with one at the end."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FIRST = [TESTS / name for name in ("distributed", "recipes", "training", "test_memory.py", "test_demo.py")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slowest files first; `make test` keeps xdist from sorting them by their number of tests."""
    items.sort(key=lambda item: not any(item.path.is_relative_to(path) for path in FIRST))
