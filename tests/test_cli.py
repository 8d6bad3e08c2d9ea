"""The command `dllm-jepa`, over a stand-in installation; `run` starts real processes with a stand-in recipe."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dllm_jepa import cli
from dllm_jepa import packaged as find_module

REPOSITORY = Path(__file__).resolve().parents[1]

RECIPE = '''"""A recipe that prints what it gets.

Launch: tune run echo_recipe.py --config small.yaml
"""
import os
from typing import Annotated
from pydantic import Field
from dllm_jepa import config

class Config(config.Config):
    size: Annotated[int, Field(ge=1, description="how large")]

    opens = (lambda size: [f"size: {size} does not fit"] if size > 8 else [],)
    remarks = (lambda size: [f"size: {size} is large"] if size > 4 else [],)

@config.parse
def recipe_main(cfg: Config) -> None:
    print(f"rank {os.environ.get('RANK', '-')} of {os.environ.get('WORLD_SIZE', '-')}: size {cfg.size}")

if __name__ == "__main__":
    recipe_main()
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel's layout with one recipe and two configs, and an empty working directory."""
    package = tmp_path / "site-packages" / "dllm_jepa"
    (package / "configs").mkdir(parents=True)
    (package / "configs" / "small.yaml").write_text("# A small one.\n#\n# Launch: ...\nsize: 1\nage: 2\n")
    (package / "configs" / "plain.yaml").write_text("size: 1\n")
    (package.parent / "dllm_jepa_echo.py").write_text(RECIPE)
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(find_module, "_PACKAGE_DIR", package)
    monkeypatch.setattr(sys, "path", [str(package.parent), *sys.path])
    monkeypatch.delitem(sys.modules, "dllm_jepa_echo", raising=False)
    monkeypatch.chdir(tmp_path / "work")
    return package


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must end with one message and code 1; return the message."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(words)
    assert exit_.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("error: ") == 1
    return captured.err


def test_ls_shows_every_entry_with_its_first_line(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["ls"])
    assert capsys.readouterr().out == (
        "RECIPE\n"
        "  dllm_jepa_echo  A recipe that prints what it gets.\n"
        "CONFIG\n"
        "  plain\n"
        "  small           A small one.\n"
    )


def test_ls_cat_and_cp_do_not_wait_for_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from dllm_jepa.cli import main; main(['ls']); main(['cat', 'tiny']); main(['cp', 'tiny', 'x']);"
        "sys.exit('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.yaml").read_bytes() == (REPOSITORY / "configs" / "tiny.yaml").read_bytes()


def test_cp_copies_under_the_right_suffix(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["cp", "dllm_jepa_echo", "mine"])
    assert Path("mine.py").read_text() == RECIPE
    assert capsys.readouterr().out == "Copied dllm_jepa_echo to mine.py\n"
    cli.main(["cp", "small", "mine.yaml"])
    assert Path("mine.yaml").read_bytes() == (installed / "configs" / "small.yaml").read_bytes()
    cli.main(["cp", "small", "."])
    assert Path("small.yaml").is_file()
    cli.main(["cp", "small", "a/b/mine.yaml", "--make-parents"])
    assert Path("a/b/mine.yaml").is_file()


def test_cp_never_overwrites_unless_told(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("edited: true\n")
    assert "'mine.yaml' exists and is kept" in fails(capsys, "cp", "small", "mine")
    assert Path("mine.yaml").read_text() == "edited: true\n"
    cli.main(["cp", "small", "mine.yaml", "--force"])
    assert Path("mine.yaml").read_text().endswith("age: 2\n")


def test_cp_says_what_is_wrong(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "cp", "smal", "mine")
    assert "no recipe or config is named 'smal'. There are: dllm_jepa_echo, plain, small" in message
    assert "folder 'no' does not exist; make it, or add --make-parents" in fails(capsys, "cp", "small", "no/mine")
    own = str(installed / "configs" / "small.yaml")
    assert "are the same file" in fails(capsys, "cp", "small", own, "--force")
    assert list(Path().iterdir()) == []


def test_cat_prints_the_file_or_the_sorted_keys(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["cat", "small"])
    assert capsys.readouterr().out == (installed / "configs" / "small.yaml").read_text()
    cli.main(["cat", "dllm_jepa_echo"])
    assert capsys.readouterr().out == RECIPE
    cli.main(["cat", "small", "--sort"])
    assert capsys.readouterr().out == "age: 2\nsize: 1\n"
    Path("own.yaml").write_text("b: 1\n")
    cli.main(["cat", "own.yaml"])
    assert capsys.readouterr().out == "b: 1\n"
    assert "'smalll' is neither a file nor a packaged config. Packaged configs: small" in fails(capsys, "cat", "smalll")


def test_validate_says_what_is_wrong(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "validate", "dllm_jepa_echo", "--config", "small", "size=0")
    assert "the config has 2 problems:\n  - size: 0 given" in message and "  - age: unknown key" in message
    assert "'no' is neither a file" in fails(capsys, "validate", "dllm_jepa_echo", "--config", "no")
    assert "'no' is neither a file nor a module nor one of our" in fails(capsys, "validate", "no", "--config", "small")
    assert "--config is missing" in fails(capsys, "validate", "dllm_jepa_echo", "size=1")
    assert "'plain' is a config: name the recipe before it" in fails(capsys, "validate", "plain")
    assert "size: 9 does not fit" in fails(capsys, "validate", "dllm_jepa_echo", "--config=plain", "size=9")


def test_validate_accepts_a_valid_config_with_its_warnings(
    installed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")  # of a machine that is not the one of the run
    Path("my_recipe.py").write_text(RECIPE)
    Path("mine.yaml").write_text("size: 1\n")
    for recipe in ("dllm_jepa_echo", "my_recipe.py"):
        cli.main(["validate", recipe, "size=5", "--config", "mine.yaml"])
        captured = capsys.readouterr()
        assert captured.out == f"{recipe} --config mine.yaml: valid\n"
        assert captured.err == "warning: size: 5 is large\n"


def test_keys_and_memory(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["keys", "dllm_jepa_echo"])
    assert "| `size` | an integer >= 1 | must be given | how large |" in capsys.readouterr().out
    message = fails(capsys, "memory", "dllm_jepa_echo", "--config", "plain")
    assert "dllm_jepa_echo does not train: only the memory of a training step is computed" in message


# run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("dllm_jepa_echo --config", "--config is missing. Usage: dllm-jepa run [TORCHRUN-OPTIONS] <recipe> --config"),
        ("dllm_jepa_echo --config smal", "'smal' is neither a file nor a packaged config. Packaged configs: small"),
        ("dllm_jepa_ecco --config=small", "'dllm_jepa_ecco' is neither a file nor a module nor one of our recipes: "),
        ("--nproc_per_node 2 none.py --config=small", "'none.py' is neither a file nor a module"),
    ],
)
def test_run_refuses_unknown_names_before_it_starts_anything(
    installed: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    assert message in fails(capsys, "run", *words.split())


def launch(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`dllm-jepa run` in a folder that holds the stand-in recipe and config."""
    (folder / "echo_recipe.py").write_text(RECIPE)
    (folder / "small.yaml").write_text("size: 1\n")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dllm_jepa.cli", "run", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def test_run_takes_what_tune_run_takes_and_config_with_an_equals_sign(tmp_path: Path) -> None:
    done = launch(tmp_path, "echo_recipe.py", "--config=small.yaml", "size=7")
    assert done.returncode == 0, done.stderr
    assert "rank - of -: size 7\n" in done.stdout


@pytest.mark.slow
def test_two_ranks_give_one_message_and_no_traceback(tmp_path: Path) -> None:
    done = launch(tmp_path, "--nproc_per_node", "2", "echo_recipe.py", "--config=small.yaml", "size=0")
    assert done.returncode == 1
    assert done.stderr.count("size: 0 given, must be an integer >= 1 (how large)") == 1
    assert "(rank 1)" not in done.stderr
    assert "Traceback" not in done.stderr


def test_words_that_no_command_knows_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["ls", "more"], ["memory", "x", "--gups", "8"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(words)
        assert exit_.value.code == 2
        assert f"unrecognized arguments: {' '.join(words[2:] or words[1:])}" in capsys.readouterr().err
