"""Names to files, command lines to configs, and user errors to one message."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from dllm_jepa.config import (
    Choice,
    Component,
    Key,
    Number,
    Schema,
    find_configs,
    find_recipes,
    load_config,
    parse,
    resolve_config,
)
from dllm_jepa.config import _parse as parse_module
from dllm_jepa.config import _resolve as resolve_module
from dllm_jepa.errors import ConfigError, DataError

REPOSITORY = Path(__file__).resolve().parents[2]

# A small schema, so that these tests are about the way to the config and not about its keys.
SCHEMA = Schema(
    keys=(
        Key("size", Number(integer=True, low=1), "how large"),
        Key("mode", Choice(("slow", "fast")), "how", default="slow"),
        Key("part", Component(), "with what", default=None, nullable=True),
    ),
)


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
    monkeypatch.setattr(resolve_module, "_PACKAGE_DIR", package)
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


def test_a_checkout_has_configs_and_recipes_at_its_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dllm_jepa").mkdir()
    (tmp_path / "configs").mkdir()
    (tmp_path / "recipes").mkdir()
    (tmp_path / "configs" / "tiny.yaml").write_text("")
    (tmp_path / "recipes" / "dllm_jepa_full.py").write_text("")
    monkeypatch.setattr(resolve_module, "_PACKAGE_DIR", tmp_path / "dllm_jepa")
    assert find_configs() == {"tiny": tmp_path / "configs" / "tiny.yaml"}
    assert find_recipes() == {"dllm_jepa_full": tmp_path / "recipes" / "dllm_jepa_full.py"}


def test_every_yaml_of_this_checkout_is_found() -> None:
    assert sorted(find_configs().values()) == sorted((REPOSITORY / "configs").rglob("*.yaml"))


def test_a_name_means_the_packaged_file_and_a_path_the_users_own(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("size: 2\n")
    (tmp_path / "tiny").write_text("size: 3\n")
    assert resolve_config("tiny") == installed / "configs" / "tiny.yaml"
    assert resolve_config("lab/big") == installed / "configs" / "lab" / "big.yaml"
    assert resolve_config("mine.yaml") == tmp_path / "mine.yaml"
    assert resolve_config("./tiny") == tmp_path / "tiny"


def test_an_unknown_name_lists_what_exists_nearest_first(installed: Path) -> None:
    with pytest.raises(ConfigError, match="'tinny' is neither a file nor a packaged config.*: tiny, lab/big"):
        resolve_config("tinny")
    with pytest.raises(ConfigError, match="'lab/bigg.yaml' is neither.*: lab/big, tiny"):
        resolve_config("lab/bigg.yaml")


def test_a_directory_is_not_a_config(installed: Path) -> None:
    with pytest.raises(ConfigError, match="'site-packages' is a directory; give a yaml file or one of: lab/big, tiny"):
        resolve_config("site-packages")


# Command lines


@pytest.mark.parametrize("words", [["--config", "tiny"], ["--config=tiny"]])
def test_both_spellings_of_config_are_taken(installed: Path, words: list[str]) -> None:
    assert load_config(words) == {"size": 1}
    assert load_config(["size=2", *words, "mode=fast"]) == {"size": 2, "mode": "fast"}


def test_overrides_go_by_torchtunes_rules(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("size: 2\nmode: fast\npart: {_component_: a.b, x: 1, y: 2}\n")
    cfg = load_config(["--config", "mine.yaml", "~mode", "~part.x", "part=c.d", "part.y=1e-3", "size=null"])
    assert cfg == {"size": None, "part": {"_component_": "c.d", "y": 0.001}}


def test_the_command_line_is_left_as_it_was(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", "tiny"])
    load_config(["--config=tiny"])
    assert sys.argv == ["recipe", "--config", "tiny"]


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "--config is missing"),
        (["--config"], "--config is missing"),
        (["--config="], "--config is missing"),
        (["size=3"], "--config is missing"),
        (["--config", "tiny", "--sizes", "3"], r"flag arguments not supported: \['--sizes'\].*key=value"),
        (["--config", "tiny", "size"], "must be in the form of key=value, got size"),
        (["--config", "tiny", "~sizes"], "Could not find key sizes"),
        (["--config", "bad_syntax.yaml"], r"bad_syntax.yaml is not valid yaml:.*line 2"),
        (["--config", "twice.yaml"], "twice.yaml is not valid yaml:.*duplicate key"),
        (["--config", "latin.yaml"], "latin.yaml is not UTF-8 text: byte 7"),
        (["--config", "list.yaml"], "list.yaml is not a mapping of keys to values"),
        (["--config", "number.yaml"], "number.yaml cannot be read"),
        (["--config", "open.yaml"], r"open.yaml is not a config: no viable alternative at input '\$\{b'"),
        (["--config", "own.yaml"], "Cannot use 'config' within a config file"),
    ],
)
def test_what_cannot_be_read_is_a_config_error(installed: Path, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "bad_syntax.yaml").write_text("size: 1\nmode: [fast\n")
    (tmp_path / "twice.yaml").write_text("size: 1\nsize: 2\n")
    (tmp_path / "latin.yaml").write_bytes("size: \xe9\n".encode("latin-1").replace(b"size: ", b"mode: a"))
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    (tmp_path / "number.yaml").write_text("3\n")
    (tmp_path / "open.yaml").write_text("size: ${b\n")
    (tmp_path / "own.yaml").write_text("config: 1\n")
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load_config(words)


# The decorator


def run(main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Call a recipe's main with a command line; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["recipe.py", *words])
    try:
        main()
    except SystemExit as exit_:
        assert isinstance(exit_.code, int)
        return exit_.code
    return 0


def test_a_recipe_gets_the_checked_config_with_defaults(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[DictConfig] = []
    main = parse(schema=SCHEMA)(lambda cfg: seen.append(cfg))
    assert run(main, monkeypatch, "--config=tiny", "size=5") == 0
    assert seen == [{"size": 5, "mode": "slow", "part": None}]


def test_problems_are_one_message_and_the_recipe_is_not_entered(
    installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def recipe_main(cfg: DictConfig) -> None:
        pytest.fail(f"entered with {cfg}")

    assert run(parse(schema=SCHEMA)(recipe_main), monkeypatch, "--config", "tiny", "size=0", "mod=fast") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "error: the config has 2 problems:\n"
        '  - mod: unknown key (value "fast"). Did you mean mode?\n'
        "  - size: 0 given, must be an integer >= 1 (how large)\n"
    )


def test_without_arguments_the_decorator_takes_the_training_schema(
    installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @parse
    def recipe_main(cfg: DictConfig) -> None:
        """Train."""

    assert recipe_main.__doc__ == "Train."
    assert run(recipe_main, monkeypatch, "--config", "tiny") == 1
    assert "tokenizer: missing" in capsys.readouterr().err


def test_the_machine_is_checked_too(
    installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_many(size: int, launch: parse_module.Launch) -> list[str]:
        return [f"size: {size} is less than {launch.world_size}"] if size < launch.world_size else []

    monkeypatch.setenv("WORLD_SIZE", "3")
    schema = Schema(keys=SCHEMA.keys, launch_rules=(too_many,))
    assert run(parse(schema=schema)(lambda cfg: None), monkeypatch, "--config=tiny") == 1
    assert "size: 1 is less than 3" in capsys.readouterr().err


def test_warnings_are_printed_once_and_do_not_stop_the_run(
    installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = Schema(keys=SCHEMA.keys, warnings=(lambda size: [f"size {size} is small"],))
    main = parse(schema=schema)(lambda cfg: None)
    assert run(main, monkeypatch, "--config=tiny") == 0
    assert capsys.readouterr().err == "warning: size 1 is small\n"
    monkeypatch.setenv("RANK", "1")
    assert run(main, monkeypatch, "--config=tiny") == 0
    assert capsys.readouterr().err == ""


def test_user_errors_of_the_recipe_are_one_message_and_others_pass(
    installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_rows(cfg: DictConfig) -> None:
        raise DataError("rows.jsonl: empty")

    def broken(cfg: DictConfig) -> None:
        raise ZeroDivisionError

    assert run(parse(schema=SCHEMA)(no_rows), monkeypatch, "--config=tiny") == 1
    assert capsys.readouterr().err == "error: rows.jsonl: empty\n"
    with pytest.raises(ZeroDivisionError):
        run(parse(schema=SCHEMA)(broken), monkeypatch, "--config=tiny")


def test_another_rank_waits_for_rank_zero_and_speaks_only_if_it_is_still_there(
    installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []

    def ended_by_torchrun(seconds: float) -> None:
        waited.append(seconds)
        assert capsys.readouterr().err == ""
        raise KeyboardInterrupt

    monkeypatch.setenv("RANK", "1")
    main = parse(schema=SCHEMA)(lambda cfg: None)
    monkeypatch.setattr(parse_module.time, "sleep", ended_by_torchrun)
    with pytest.raises(KeyboardInterrupt):
        run(main, monkeypatch, "--config=tiny", "size=0")
    assert waited and waited[0] >= 5
    assert capsys.readouterr().err == ""

    monkeypatch.setattr(parse_module.time, "sleep", waited.append)
    assert run(main, monkeypatch, "--config=tiny", "size=0") == 1
    assert capsys.readouterr().err.startswith("error (rank 1): the config has a problem:\n  - size: 0 given")


def test_help_is_argparses_own(
    installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(parse(schema=SCHEMA)(lambda cfg: None), monkeypatch, "--help") == 0
    assert "--config" in capsys.readouterr().out
