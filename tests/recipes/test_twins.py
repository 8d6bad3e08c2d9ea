"""The two recipes are twins: what one method of theirs says, the other's says, too, but for a list of exceptions."""

import ast
from pathlib import Path

import pytest

from tests.launching import ROOT

FULL, LORA = (ROOT / "recipes" / f"{name}.py" for name in ("dllm_jepa_full", "dllm_jepa_lora"))

SAME = {
    "__init__",
    "train",
    "aligns",
    "embed_targets",
    "gather",
    "check_health",
    "save_if_due",
    "setup_predictor",
    "setup_run",
}
DIFFERENT = {
    "setup": "its schema and facts, no anchor, an optimizer of what is trained alone",
    "setup_batches": "a plan that always accumulates: there is no optimizer_in_bwd",
    "setup_model": "a frozen base of a type of its own, and first weights of the adapters",
    "setup_target_encoder": "averages of the adapters instead of a copy of the backbone",
    "update_weights": "no anchor, no optimizer_in_bwd",
    "export": "adapters, and merged models if asked for",
}


def methods(recipe: Path) -> dict[str, str]:
    """The syntax tree of every method of the recipe's class, as text without positions and docstrings."""
    (recipe_class,) = (node for node in ast.parse(recipe.read_text()).body if isinstance(node, ast.ClassDef))
    trees = {}
    for node in recipe_class.body:
        if isinstance(node, ast.FunctionDef):
            if ast.get_docstring(node) is not None:
                del node.body[0]
            trees[node.name] = ast.dump(node)
    return trees


def test_the_recipes_have_the_same_methods_in_the_same_order() -> None:
    assert list(methods(FULL)) == list(methods(LORA))
    assert set(methods(FULL)) == SAME | set(DIFFERENT)


@pytest.mark.parametrize("name", sorted(SAME))
def test_methods_that_are_the_same(name: str) -> None:
    assert methods(FULL)[name] == methods(LORA)[name]


def test_no_other_method_differs_and_these_do() -> None:
    full, lora = methods(FULL), methods(LORA)
    assert {name for name in full.keys() | lora.keys() if full.get(name) != lora.get(name)} == set(DIFFERENT)


def test_a_change_of_one_character_is_seen(tmp_path: Path) -> None:
    changed = tmp_path / "recipe.py"
    source = FULL.read_text()
    assert source.count("self.save_if_due(step)") == 1
    changed.write_text(source.replace("self.save_if_due(step)", "self.save_if_due(step + 1)"))
    assert {name for name, tree in methods(changed).items() if tree != methods(FULL)[name]} == {"train"}
