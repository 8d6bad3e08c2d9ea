"""Names to files, command lines to configs, and user errors to one message."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from dllm_jepa import config
from dllm_jepa import packaged as find_module
from dllm_jepa.config import Component, Config, find_configs, find_recipes, load_config, parse, resolve_config
from dllm_jepa.config import _parse as parse_module
from dllm_jepa.errors import ConfigError, DataError, LaunchError

REPOSITORY = Path(__file__).resolve().parents[2]


class Small(Config):
    """So that these tests are about the way to the config and not about its keys."""

    size: Annotated[int, Field(ge=1, description="how large")]
    mode: Literal["slow", "fast"] = "slow"
    part: Component | None = None


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The layout of an installed wheel with two configs and two recipes."""
    package = tmp_path / "site-packages" / "dllm_jepa"
    (package / "configs" / "lab").mkdir(parents=True)
    (package / "configs" / "tiny.yaml").write_text("size: 1\n")
    (package / "configs" / "lab" / "big.yaml").write_text("size: 9\n")
    (package.parent / "dllm_jepa_full.py").write_text("")
    (package.parent / "dllm_jepa_lora.py").write_text("")
    (package.parent / "another.py").write_text("")
    monkeypatch.setattr(find_module, "_PACKAGE_DIR", package)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return package


# Names


def test_a_wheel_has_configs_in_the_package_and_recipes_beside_it(installed: Path) -> None:
    assert find_configs() == {
        "lab/big": installed / "configs" / "lab" / "big.yaml",
        "tiny": installed / "configs" / "tiny.yaml",
    }
    assert find_recipes() == {
        "dllm_jepa_full": installed.parent / "dllm_jepa_full.py",
        "dllm_jepa_lora": installed.parent / "dllm_jepa_lora.py",
    }


def test_a_checkout_has_configs_and_recipes_at_its_root() -> None:
    assert sorted(find_configs().values()) == sorted((REPOSITORY / "configs").rglob("*.yaml"))
    assert sorted(find_recipes().values()) == sorted((REPOSITORY / "recipes").glob("*.py"))


def test_a_name_means_the_packaged_file_and_a_path_the_users_own(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("size: 2\n")
    (tmp_path / "tiny").write_text("size: 3\n")
    assert resolve_config("tiny") == installed / "configs" / "tiny.yaml"
    assert resolve_config("lab/big") == installed / "configs" / "lab" / "big.yaml"
    assert resolve_config("mine.yaml") == tmp_path / "mine.yaml"
    assert resolve_config("./tiny") == tmp_path / "tiny"


def test_an_unknown_name_lists_what_exists_nearest_first(installed: Path) -> None:
    with pytest.raises(ConfigError, match="'lab/bigg.yaml' is neither a file nor a packaged config.*: lab/big, tiny"):
        resolve_config("lab/bigg.yaml")
    with pytest.raises(ConfigError, match="'site-packages' is a directory; give a yaml file or one of: lab/big, tiny"):
        resolve_config("site-packages")


def test_a_recipe_is_a_name_a_file_or_a_module(installed: Path, tmp_path: Path) -> None:
    source = (
        "from dllm_jepa import config\n\nclass Config(config.Config):\n    size: int\n\n"
        "@config.parse\ndef recipe_main(cfg: Config) -> None: ...\n"
    )
    (tmp_path / "mine.py").write_text(source)
    (tmp_path / "another.py").write_text("")
    for recipe in ("mine.py", "mine"):
        assert list(config.recipe_config(recipe).model_fields) == ["size"]
    assert "jepa_every" in config.recipe_config("dllm_jepa_full").model_fields
    with pytest.raises(LaunchError, match="another is no recipe: it has no function recipe_main under"):
        config.recipe_config("another")
    with pytest.raises(LaunchError, match="'dllm_jepa_ful' is neither a file nor .*: dllm_jepa_full, dllm_jepa_lora"):
        config.recipe_config("dllm_jepa_ful")
    with pytest.raises(LaunchError, match="'tiny' is a config: name the recipe before it, RECIPE --config tiny"):
        config.recipe_config("tiny")


# Command lines


def test_both_spellings_of_config_are_taken(installed: Path) -> None:
    assert load_config(["size=2", "--config", "tiny", "mode=fast"]) == {"size": 2, "mode": "fast"}
    assert load_config(["size=2", "--config=tiny", "mode=fast"]) == {"size": 2, "mode": "fast"}


def test_overrides_go_by_torchtunes_rules(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("size: 2\nmode: fast\npart: {_component_: a.b, x: 1, y: 2}\n")
    cfg = load_config(["--config", "mine.yaml", "~mode", "~part.x", "part=c.d", "part.y=1e-3", "size=null"])
    assert cfg == {"size": None, "part": {"_component_": "c.d", "y": 0.001}}
    cfg = load_config(["--config", "mine.yaml", "part={_component_: c.d}", "size=${mode}", "new.key=[1, 2]"])
    assert cfg == {"size": "fast", "mode": "fast", "part": {"_component_": "c.d"}, "new": {"key": [1, 2]}}
    (tmp_path / "unset.yaml").write_text("mode: ???\npart: {_component_: a.b, x: '${mode}'}\n")
    cfg = load_config(["--config", "unset.yaml", "part.x=1", "mode=fast"])
    assert cfg == {"mode": "fast", "part": {"_component_": "a.b", "x": 1}}


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "--config is missing"),
        (["--config"], "--config is missing"),
        (["--config", "tiny", "--sizes", "3"], "'--sizes' is neither key=value nor ~key; options of torchrun come"),
        (["--config", "tiny", "size"], "'size' is neither key=value nor ~key"),
        (["--config", "tiny", "~sizes"], "'~sizes' removes a key that is not there"),
        (["--config", "tiny", "~size.x.y"], "'~size.x.y' cannot be applied"),
        (["--config", "tiny", "size={"], "'size={' cannot be applied"),
        (["--config", "tiny", "size=${a", "mode=1"], "'size=.{a' cannot be applied"),
        (["--config", "tiny", "size=${a}", "mode=${b}"], "(?s)cannot be resolved:.*- size: .*'a'.*- mode: .*'b'"),
        (["--config", "bad_syntax.yaml"], r"bad_syntax.yaml is not valid yaml:.*line 2"),
        (["--config", "twice.yaml"], "twice.yaml is not valid yaml:.*duplicate key"),
        (["--config", "latin.yaml"], "latin.yaml is not UTF-8 text: byte 7"),
        (["--config", "list.yaml"], "list.yaml is not a mapping of keys to values"),
        (["--config", "number.yaml"], "number.yaml cannot be read"),
        (["--config", "open.yaml"], r"open.yaml is not a config: no viable alternative at input '\$\{b'"),
    ],
)
def test_what_cannot_be_read_is_a_config_error(installed: Path, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "bad_syntax.yaml").write_text("size: 1\nmode: [fast\n")
    (tmp_path / "twice.yaml").write_text("size: 1\nsize: 2\n")
    (tmp_path / "latin.yaml").write_bytes(b"mode: a\xe9\n")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    (tmp_path / "number.yaml").write_text("3\n")
    (tmp_path / "open.yaml").write_text("size: ${b\n")
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load_config(words)


# The decorator


def run(main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    """Call a recipe's main with a command line; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["recipe.py", *words])
    try:
        main()
    except SystemExit as exit_:
        return exit_.code
    return 0


@parse
def idle(cfg: Small) -> None:
    """Do nothing."""


def test_a_recipe_gets_the_checked_config_with_defaults(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    @parse
    def recipe_main(cfg: Small) -> None:
        """Train."""
        seen.append(cfg)

    assert run(recipe_main, monkeypatch, "--config=tiny", "size=5") == 0
    assert seen == [Small(size=5, mode="slow", part=None)]
    assert recipe_main.__doc__ == "Train."
    assert run(recipe_main, monkeypatch, "--config=tiny", "part=os.getcwd") == 0
    assert seen[1].part == Component("os.getcwd")


def test_problems_are_one_message_and_the_recipe_is_not_entered(
    installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @parse
    def recipe_main(cfg: Small) -> None:
        pytest.fail(f"entered with {cfg}")

    assert run(recipe_main, monkeypatch, "--config", "tiny", "size=0", "mod=fast") == 1
    assert capsys.readouterr() == (
        "",
        "error: the config has 2 problems:\n"
        "  - size: 0 given, must be an integer >= 1 (how large)\n"
        '  - mod: unknown key (value "fast"). Did you mean mode?\n',
    )


class Ruled(Small):
    rules = (lambda size, launch: [f"size: {size} is less than {launch.world_size}"] * (size < launch.world_size),)
    opens = (lambda size: ["size: 7 does not open"] * (size == 7),)
    remarks = (lambda size: [f"size {size} is small"],)


def test_rules_see_the_launch_and_rank_zero_alone_opens_files_and_warns(
    installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @parse
    def recipe_main(cfg: Ruled) -> None: ...

    monkeypatch.setattr(parse_module.time, "sleep", lambda _: None)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert run(recipe_main, monkeypatch, "--config=tiny") == 1
    assert "size: 1 is less than 3" in capsys.readouterr().err
    assert run(recipe_main, monkeypatch, "--config=tiny", "size=7") == 1
    assert "size: 7 does not open" in capsys.readouterr().err
    assert run(recipe_main, monkeypatch, "--config=tiny", "size=7", "mode=odd") == 1
    assert "size: 7 does not open" not in capsys.readouterr().err  # opened only without other problems
    assert run(recipe_main, monkeypatch, "--config=tiny", "size=4") == 0
    assert capsys.readouterr().err == "warning: size 4 is small\n"
    monkeypatch.setenv("RANK", "1")
    assert run(recipe_main, monkeypatch, "--config=tiny", "size=7") == 0
    assert capsys.readouterr().err == ""


def test_user_errors_of_the_recipe_are_one_message_and_others_pass(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @parse
    def no_rows(cfg: Small) -> None:
        raise DataError("rows.jsonl: empty")

    @parse
    def broken(cfg: Small) -> None:
        raise ZeroDivisionError

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert run(no_rows, monkeypatch, "--config=tiny") == 1
    assert capsys.readouterr().err == "error: rows.jsonl: empty\n"
    assert '"message": "error: rows.jsonl: empty"' in (tmp_path / "error.json").read_text()  # torchrun quotes it
    with pytest.raises(ZeroDivisionError):
        run(broken, monkeypatch, "--config=tiny")


def test_another_rank_waits_for_rank_zero_and_speaks_only_if_it_is_still_there(
    installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []

    def ended_by_torchrun(seconds: float) -> None:
        waited.append(seconds)
        assert capsys.readouterr().err == ""
        raise KeyboardInterrupt

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(parse_module.time, "sleep", ended_by_torchrun)
    with pytest.raises(KeyboardInterrupt):
        run(idle, monkeypatch, "--config=tiny", "size=0")
    assert waited and waited[0] >= 5
    assert capsys.readouterr().err == ""

    monkeypatch.setattr(parse_module.time, "sleep", waited.append)
    assert run(idle, monkeypatch, "--config=tiny", "size=0") == 1
    assert capsys.readouterr().err.startswith("error (rank 1): the config has a problem:\n  - size: 0 given")


def test_help_lists_the_keys(
    installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(idle, monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert out.startswith("Names to files, command lines to configs")
    assert "| `size` | an integer >= 1 | must be given | how large |" in out
    assert '| `mode` | one of slow, fast | `"slow"` |  |' in out
    assert "| `part` | a component or null | `null` |  |" in out
