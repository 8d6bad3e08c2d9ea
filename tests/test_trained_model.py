"""Opening any model by its directory: the same weights as what wrote them, and one message for what is none."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dllm_jepa import cli
from dllm_jepa.config import Component
from dllm_jepa.errors import CheckpointError
from dllm_jepa.models import load_adapter, load_hf
from dllm_jepa.models.tiny._tokenizer import TinyTokenizer
from dllm_jepa.trained_model import open_model
from tests.launching import SMALL_LORA, run_here
from tests.training.small_checkpoints import forge

CPU = torch.device("cpu")
TOKENS = torch.tensor([[3, 8, 500, 17, 4, 9]])
EVERY_STEP = "checkpoint.every_n_steps=2"


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short full run with both models exported."""
    run = tmp_path_factory.mktemp("full") / "run"
    run_here(run, "max_steps=2", EVERY_STEP, "export=both")
    return run


@pytest.fixture(scope="module")
def lora_run(full_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of adapters, with DoRA, on the model of the full run."""
    run = tmp_path_factory.mktemp("lora") / "run"
    lora = [f"checkpoint_dir={full_run / 'hf'}", "max_steps=2", EVERY_STEP, "model.use_dora=true"]
    run_here(run, *lora, "export=both", "export_merged=true", recipe="dllm_jepa_lora", base=SMALL_LORA)
    return run


def logits(path: Path, part: str = "online", dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        model = open_model(path, part=part).load(dtype, CPU)
        assert not model.training and {param.dtype for param in model.parameters()} == {dtype}
        return model.token_logits(TOKENS).float()


def state_of(run: Path) -> Path:
    return run / "checkpoints" / "step_00000002"


def test_a_training_state_is_the_model_that_its_run_exports(full_run: Path) -> None:
    found = {part: logits(state_of(full_run), part) for part in ("online", "target")}
    assert torch.equal(found["online"], logits(full_run / "hf"))
    assert torch.equal(found["target"], load_hf(full_run / "hf_target").token_logits(TOKENS))
    assert not torch.equal(found["online"], found["target"])


@pytest.mark.parametrize(("part", "export"), [("online", "adapter"), ("target", "adapter_target")])
def test_an_adapter_stands_on_its_base(lora_run: Path, full_run: Path, part: str, export: str) -> None:
    of_adapter = logits(lora_run / export)
    assert torch.equal(of_adapter, logits(state_of(lora_run), part))
    assert (of_adapter - logits(full_run / "hf")).abs().max() > 1e-6
    torch.testing.assert_close(of_adapter, load_adapter(lora_run / export).token_logits(TOKENS), atol=1e-5, rtol=0)
    assert open_model(lora_run / export).tokenizer_dir == full_run / "hf"


def test_the_tokenizer_is_found_for_every_kind(full_run: Path, lora_run: Path) -> None:
    for path in (full_run / "hf", state_of(full_run), lora_run / "adapter", state_of(lora_run)):
        tokenizer = open_model(path).tokenizer()
        assert isinstance(tokenizer, TinyTokenizer), path
        assert tokenizer.decode(tokenizer.encode("lines with a number")) == "lines with a number"


def test_a_tokenizer_that_a_file_names_is_not_called_unless_it_is_ours(full_run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(full_run / "hf", tmp_path / "hf")
    file = copy / "tokenizer_config.json"
    config = json.loads(file.read_text())
    assert config["dllm_jepa.tokenizer"] == "dllm_jepa.models.tiny.tiny_tokenizer"
    file.write_text(json.dumps(config | {"dllm_jepa.tokenizer": "os.getcwd"}))
    assert not isinstance(open_model(copy).tokenizer(), TinyTokenizer | str)  # that of the family


def test_the_tokenizer_that_a_config_names(full_run: Path, tmp_path: Path) -> None:
    source = open_model(full_run / "hf")
    tiny = "dllm_jepa.models.tiny.tiny_tokenizer"
    assert isinstance(source.tokenizer(Component(tiny)), TinyTokenizer)
    with pytest.raises(CheckpointError, match="absent does not exist"):
        source.tokenizer(Component(tiny, {"path": str(tmp_path / "absent")}))
    small = open_model("tests/assets/llada_tiny")  # scores 320 ids
    with pytest.raises(CheckpointError, match="scores 320 ids, but the tokenizer has ids up to 507"):
        small.tokenizer(Component(tiny, {"path": str(full_run / "hf")}))


def test_fingerprints_differ_where_weights_do(full_run: Path, lora_run: Path) -> None:
    sources = [open_model(path) for path in (full_run / "hf", full_run / "hf_target", state_of(full_run))]
    sources += [open_model(state_of(full_run), part="target"), open_model(state_of(lora_run))]
    sources += [open_model(lora_run / name) for name in ("adapter", "adapter_target", "hf")]
    assert len({source.fingerprint for source in sources}) == len(sources)


@pytest.mark.parametrize("run", ["full_run", "lora_run"])
def test_every_kind_of_a_run_is_one_model_in_either_type(run: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(run)
    kinds = [path / "hf", state_of(path), *([path / "adapter"] if run == "lora_run" else [])]
    for dtype in (torch.float32, torch.bfloat16):
        merged, *others = (logits(kind, dtype=dtype) for kind in kinds)
        assert all(torch.equal(other, merged) for other in others)


def test_what_is_no_model_is_one_message(full_run: Path, lora_run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is the folder of a run: .*hf, .*hf_target, .*step_00000002"):
        open_model(full_run)
    with pytest.raises(CheckpointError, match=r"give one of the models in it: .*step_00000002"):
        open_model(full_run / "checkpoints")
    with pytest.raises(CheckpointError, match="no config.json"):
        open_model(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_model(tmp_path / "absent")
    for path in (full_run / "hf", lora_run / "adapter"):
        with pytest.raises(CheckpointError, match="no training state"):
            open_model(path, part="target")


def test_a_base_that_has_moved(lora_run: Path, full_run: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(full_run / "hf", tmp_path / "moved")
    adapter = Path(shutil.copytree(lora_run / "adapter", tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "gone/hf"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    state = Path(shutil.copytree(state_of(lora_run), tmp_path / "step_00000002"))
    facts = json.loads((state / "state.json").read_text()) | {"base": str(tmp_path / "gone/hf")}
    tokenizer = "_component_: dllm_jepa.models.tiny.tiny_tokenizer\n"
    config_yaml = (state / "config.yaml").read_text()
    assert tokenizer in config_yaml
    config_yaml = config_yaml.replace(tokenizer, f"{tokenizer}  path: {facts['base']}\n")
    forge(state, **{"state.json": json.dumps(facts).encode(), "config.yaml": config_yaml.encode()})
    expected = logits(lora_run / "hf")
    for path in (adapter, state):
        with pytest.raises(CheckpointError, match="gone/hf"):
            open_model(path)
        source = open_model(path, base=moved)
        assert torch.equal(source.load(torch.float32, CPU).token_logits(TOKENS).detach(), expected)
        assert source.tokenizer_dir == moved and isinstance(source.tokenizer(), TinyTokenizer)
        with pytest.raises(CheckpointError, match=r"trained on other weights than those of .*hf_target"):
            open_model(path, base=full_run / "hf_target")
    for path in (moved, state_of(full_run)):
        with pytest.raises(CheckpointError, match="only adapters stand on a base"):
            open_model(path, base=moved)


def test_an_adapter_is_exported_merged(lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, out = str(lora_run / "adapter"), tmp_path / "out"
    cli.main(["export", adapter, str(out), "--merged"])
    assert (out / "README.md").read_text() == (lora_run / "adapter/README.md").read_text()
    for file in (lora_run / "hf").iterdir():
        if file.name != "README.md":
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    for words, message in (
        ([], "is an adapter already: add --merged"),
        (["--merged", "--part", "target"], "only training states have a part 'target'"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["export", adapter, str(tmp_path / "other"), *words])
        assert message in capsys.readouterr().err


def test_a_run_stands_for_its_newest_training_state(
    full_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["export", str(full_run), str(tmp_path / "out")])
    name = "model-00001-of-00001.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (full_run / "hf" / name).read_bytes()
    elsewhere = tmp_path / "states"  # as with checkpoint.directory
    shutil.copytree(full_run / "checkpoints", elsewhere, symlinks=True)
    (tmp_path / "run").mkdir()
    status = json.loads((full_run / "status.json").read_text()) | {"checkpoint": str(elsewhere / "step_00000002")}
    (tmp_path / "run/status.json").write_text(json.dumps(status))
    for path in (full_run, full_run / "checkpoints", full_run / "checkpoints/latest", tmp_path / "run"):
        cli.main(["checkpoints", str(path)])
        lines = [line.split() for line in capsys.readouterr().out.splitlines() if "STEP" not in line]
        assert [(words[0], words[-1]) for words in lines if words[0] != "wrote"] == [("2", "verified")], path


def test_the_prompt_format_of_the_training(full_run: Path, lora_run: Path, tmp_path: Path) -> None:
    prompt = {"template": "chat", "system_prompt": "Be short."}
    adapter = Path(shutil.copytree(lora_run / "adapter", tmp_path / "adapter"))
    (adapter / "dllm_jepa.json").write_text(json.dumps({"prompt": prompt}))
    state = Path(shutil.copytree(state_of(full_run), tmp_path / "step_00000002"))
    facts = json.loads((state / "state.json").read_text())
    forge(state, **{"state.json": json.dumps(facts | {"prompt": prompt}).encode()})
    cli.main(["export", str(state), str(tmp_path / "hf")])
    cli.main(["export", str(adapter), str(tmp_path / "merged"), "--merged"])
    for path in (adapter, state, tmp_path / "hf", tmp_path / "merged"):
        assert open_model(path).prompt == prompt, path
    forge(state, **{"state.json": json.dumps(facts | {"prompt": "chat"}).encode()})
    with pytest.raises(CheckpointError, match=r"state\.json: prompt is 'chat'; it must be an object with template"):
        open_model(state)


def test_adapter_files_beside_a_whole_model_do_not_matter(lora_run: Path, full_run: Path, tmp_path: Path) -> None:
    both = shutil.copytree(full_run / "hf", tmp_path / "both")
    shutil.copytree(lora_run / "adapter", both, dirs_exist_ok=True)
    assert torch.equal(logits(both), logits(full_run / "hf"))


def test_an_adapter_on_itself(lora_run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(lora_run / "adapter", tmp_path / "adapter")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(copy)}))
    with pytest.raises(CheckpointError, match="is an adapter, without the weights of its base"):
        open_model(copy)


def test_a_damaged_training_state_is_refused(full_run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(state_of(full_run), tmp_path / "step_00000002")
    (largest,) = sorted(copy.glob("*.distcp"), key=lambda path: path.stat().st_size)[-1:]
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        open_model(copy)


def test_a_run_without_target_encoder_has_no_such_part(tmp_path: Path) -> None:
    run_here(tmp_path / "run", "max_steps=2", EVERY_STEP, "jepa_weight=0")
    with pytest.raises(CheckpointError, match="has no target encoder"):
        open_model(state_of(tmp_path / "run"), part="target")
