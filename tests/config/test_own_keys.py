"""A key of one's own: a line in the `Config` of a copied recipe, and nothing in the package, as users do it."""

import re
import sys
from pathlib import Path
from typing import Annotated, Self

import pytest
import yaml
from pydantic import AfterValidator, model_validator

from dllm_jepa import cli
from dllm_jepa.config import Config, Section, key_table, load_config, recipe_config
from tests.launching import ROOT, SMALL, SMALL_EVAL, SMALL_LORA

MODEL = f"checkpoint_dir={ROOT / 'tests/assets/llada_tiny'}"
LAUNCHES = {"dllm_jepa_full": SMALL, "dllm_jepa_lora": SMALL_LORA, "dllm_jepa_eval": [*SMALL_EVAL, MODEL]}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that holds what a model directory is to config rules; the command line of this process comes back."""
    (tmp_path / "runs" / "demo" / "hf").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["dllm-jepa"])
    monkeypatch.delitem(sys.modules, "my", raising=False)


def copy(recipe: str, *keys: str, body: str = "") -> None:
    """my.py: a copy with keys at the end of its Config, and lines at the beginning of its recipe_main."""
    cli.main(["cp", recipe, "my.py"])
    head, class_line, rest = Path("my.py").read_text().partition("\nclass Config(")
    config_class, rules, rest = rest.partition("\n    rules = (")
    source = head + class_line + config_class + "".join(f"\n    {key}" for key in keys) + "\n" + rules + rest
    main = "def recipe_main(cfg: Config) -> None:\n"
    head, main, rest = source.partition(main)
    assert config_class and rules and main
    docstring, _, rest = rest.partition("\n")
    Path("my.py").write_text(f"{head}{main}{docstring}\n{body}{rest}")


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        cli.main(words)
    assert exit_.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("recipe", LAUNCHES)
def test_one_line_makes_a_key(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    copy(recipe, "smoothing: float = 0.1", body="    print(cfg.smoothing)\n    print(cfg.to_yaml())\n    return\n")
    start = ["run", "my.py", *LAUNCHES[recipe]]
    capsys.readouterr()
    for words, value in (([], 0.1), (["smoothing=0.3"], 0.3), (["smoothing=1"], 1.0)):
        cli.main([*start, *words])
        first, _, saved = capsys.readouterr().out.partition("\n")
        assert float(first) == value == yaml.safe_load(saved)["smoothing"]
    message = fails(capsys, *start, "smothing=0.3")
    assert "smothing: unknown key (value 0.3). Did you mean smoothing?" in message
    assert "smoothing: true given, must be a number" in fails(capsys, *start, "smoothing=true")
    cli.main(["keys", "my.py"])
    assert "| `smoothing` | a number | `0.1` |  |" in capsys.readouterr().out


def test_it_is_saved_by_a_run_and_decides_whether_that_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    copy("dllm_jepa_full", "smoothing: float = 0.1")
    start = ["run", "my.py", *SMALL, "lr_scheduler=null", "checkpoint.every_n_steps=1"]
    start.remove("lr_scheduler.num_warmup_steps=3")
    cli.main([*start, "max_steps=1", "output_dir=run", "smoothing=0.3"])
    assert yaml.safe_load(Path("run/config.yaml").read_text())["smoothing"] == 0.3
    cli.main(["validate", "my.py", "--config", "run/config.yaml", "output_dir=again"])
    message = fails(capsys, *start, "max_steps=2", "output_dir=other", "resume=run/checkpoints/latest")
    assert message.count("\n  - ") == 1 and "  - smoothing: 0.3 -> 0.1\n" in message


def test_a_key_may_hold_lists_texts_and_paths(capsys: pytest.CaptureFixture[str]) -> None:
    keys = ("betas: tuple[float, float] = (0.9, 0.95)", "names: list[str] = []", "folder: Path = Path('x')")
    copy("dllm_jepa_full", *keys)
    copied = Path("my.py")
    copied.write_text(copied.read_text().replace("import math\n", "import math\nfrom pathlib import Path\n"))
    own = recipe_config("my.py")
    cfg = own.check(load_config([*SMALL, "betas=[0.5, 1]", "names=[a, b]", "folder=y"], own))
    assert (cfg.betas, cfg.names, cfg.folder) == ((0.5, 1.0), ["a", "b"], Path("y"))
    assert own.problems(yaml.safe_load(cfg.to_yaml())) == []
    assert own.problems(load_config([*SMALL, "betas=[0.5]", "names=[a, 1]"], own)) == [
        "betas: [0.5] given, must be a list [a number, a number]",
        'names: ["a", 1] given, must be a list, each a text',
    ]


def test_the_lines_of_the_docs_are_keys(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "configs.md").read_text()
    copy("dllm_jepa_full", *re.findall(r"^    (\w+: Annotated.*)$", page, flags=re.MULTILINE))
    own = recipe_config("my.py")
    start = [*SMALL, "critic={_component_: dllm_jepa.jepa.ema_target_encoder, x: 1}"]
    assert own.model_fields.keys() >= {"smoothing", "layers", "note", "critic"}
    values = load_config([*start, "smoothing=1", "layers=[0, a]", "note=# a"], own)
    assert values["note"] == "# a"
    keys = [line.partition(" ")[0] for line in own.problems(values)]
    assert keys == ["smoothing:", "layers:", "critic.x:", "critic.copy_backbone:"]


def test_a_section_of_keys() -> None:
    class Inner(Section):
        depth: int = 1

    class Outer(Config):
        inner: Inner = Inner()

    assert Outer.check({"inner": {"depth": 2}}).inner.depth == 2
    assert Outer.problems({"inner": {"dept": 2}}) == ["inner.dept: unknown key (value 2). Did you mean depth?"]
    assert "| `inner.depth` | an integer | `1` |  |" in key_table(Outer)


def test_a_rule_on_what_is_no_key_is_refused() -> None:
    def on_nothing(nothing: int) -> list[str]:
        return [str(nothing)]

    with pytest.raises(TypeError, match="Own: rule on_nothing reads 'nothing', which is no key"):
        type("Own", (Config,), {"rules": (on_nothing,)})


def test_a_copy_finds_its_neighbours(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    copy("dllm_jepa_full", "note: str = neighbour.NOTE", body="    print(cfg.note)\n    return\n")
    text = Path("my.py").read_text().replace("import math\n", "import math\nimport neighbour\n", 1)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "copy.py").write_text(text)
    (tmp_path / "sub" / "neighbour.py").write_text('NOTE = "1e3"\n')
    cli.main(["validate", "sub/copy.py", *SMALL])
    sys.path.remove(str(tmp_path / "sub"))
    del sys.modules["neighbour"]
    cli.main(["run", "sub/copy.py", *SMALL])
    assert capsys.readouterr().out.endswith("1e3\n")
    del sys.modules["neighbour"]


def test_a_text_that_looks_like_a_number_stays_one_in_the_saved_config(tmp_path: Path) -> None:
    copy("dllm_jepa_full", "note: str = ''")
    own = recipe_config("my.py")
    for text in ("1e3", "010", "yes", "null", "0x1f", "1_000"):
        cfg = own.check(load_config([*SMALL, f"note='{text}'"], own))
        (tmp_path / "config.yaml").write_text(cfg.to_yaml())
        assert load_config(["--config", "config.yaml"])["note"] == text


def test_validators_of_a_copy_have_their_say(capsys: pytest.CaptureFixture[str]) -> None:
    def lucky(value: float) -> float:
        if value == 7:
            raise ValueError("seven is unlucky")
        return value

    class Own(Config):
        low: Annotated[float, AfterValidator(lucky)] = 0.0
        high: float = 1.0

        @model_validator(mode="after")
        def ordered(self) -> Self:
            if self.low > self.high:
                raise ValueError("low must not be above high")
            return self

    assert Own.problems({"low": 7}) == ["low: 7 given: Value error, seven is unlucky"]
    assert Own.problems({"low": 2}) == ["Value error, low must not be above high"]
    assert Own.problems({"low": 2, "high": 3}) == []


def test_a_value_that_must_be_set_is_one_problem() -> None:
    copy("dllm_jepa_full")
    own = recipe_config("my.py")
    (line,) = own.problems(load_config([*SMALL, "checkpoint.every_n_steps=???"], own))
    assert line.startswith("checkpoint.every_n_steps: ??? must be set")
