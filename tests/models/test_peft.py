"""Adapters in PEFT's layout: loaded by PEFT itself onto the published names, and every way they can be wrong."""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dllm_jepa.errors import CheckpointError
from dllm_jepa.models import (
    FAMILIES,
    HFCheckpoint,
    LoRASettings,
    MaskedDiffusionLM,
    OpenedAdapter,
    is_adapter,
    load_adapter,
    load_hf,
    merged_weights,
    save_adapter,
    save_hf,
)
from dllm_jepa.models.dream import dream, lora_dream
from dllm_jepa.models.llada import llada, lora_llada

SIZES = {
    "vocab_size": 48,
    "embed_dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_dim": 48,
    "max_seq_len": 16,
}
BUILDERS: dict[str, Any] = {"llada": (llada, lora_llada), "dream": (dream, lora_dream)}
ALL: dict[str, Any] = {
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 4,
    "lora_alpha": 6.0,
    "lora_dropout": 0.25,
}
SOME = ALL | {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": False}
TOKENS = torch.randint(0, 48, (3, 9), generator=torch.Generator().manual_seed(1))
WEIGHTS = "adapter_model.safetensors"

families = pytest.mark.parametrize("family", ["llada", "dream"])


def save_base(family: str, directory: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = BUILDERS[family][0](**SIZES)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.normal_(std=0.1).add_(name.endswith("scale"))
    save_hf(model, directory)
    return directory


def published(base: Path) -> nn.Module:
    """Modules with the names and the weights of a directory, as far as PEFT looks: every matrix is a linear layer."""
    weights, tree = load_file(base / "model-00001-of-00001.safetensors"), nn.Module()
    for name, weight in weights.items():
        path, _, leaf = name.rpartition(".")
        *parents, last = path.split(".")
        module = tree
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        if leaf == "weight" and weight.ndim == 2:
            module.add_module(last, nn.Linear(*reversed(weight.shape), bias=f"{path}.bias" in weights))
        elif leaf == "weight":
            module.add_module(last, nn.LayerNorm(weight.shape, bias=False))
    tree.load_state_dict(weights)
    return tree


def assert_merged_by_peft(theirs: Any, base: Path, adapters: Mapping[str, Tensor], settings: LoRASettings) -> None:
    """PEFT's merged weights are ours, under their published names."""
    found, plain = theirs.merge_and_unload().state_dict(), HFCheckpoint(base)
    names = FAMILIES[plain.family].hf_names(plain.sizes)
    assert found.keys() == {*names.values()}
    for name, weight in merged_weights(names, plain.read, adapters, settings):
        torch.testing.assert_close(found[names[name]], weight, atol=1e-6, rtol=1e-6)
        is_adapted = f"{name.removesuffix('.weight')}.lora_a.weight" in adapters
        assert torch.equal(found[names[name]], plain.read(name)) != is_adapted


def trained(family: str, base: Path, **settings: Any) -> tuple[MaskedDiffusionLM, dict[str, Tensor]]:
    """A model with adapters as after training, and copies of these."""
    model = BUILDERS[family][1](**SIZES, **(ALL | settings))
    model.load_state_dict(load_hf(base).state_dict(), strict=False)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if is_adapter(name):
                param.uniform_(-0.2, 0.2, generator=generator).add_(0.6 * name.endswith("magnitude"))
    return model.eval(), {n: p.detach().clone() for n, p in model.named_parameters() if is_adapter(n)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a base and an adapter on it."""
    directory = tmp_path_factory.mktemp("whole")
    model, adapters = trained("llada", save_base("llada", directory / "base"))
    save_adapter(model, directory / "adapter", adapters, base=directory / "base")
    return directory


@pytest.fixture
def base(whole: Path) -> Path:
    return whole / "base"


@pytest.fixture
def adapter(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole / "adapter", tmp_path / "adapter"))


@families
@pytest.mark.parametrize("settings", [SOME, ALL | {"use_dora": True}], ids=["some, LoRA", "all, DoRA"])
@torch.no_grad()
def test_peft_loads_them_on_the_published_names(family: str, settings: Any, tmp_path: Path) -> None:
    base = save_base(family, tmp_path / "base")
    model, adapters = trained(family, base, **settings)
    save_adapter(model, tmp_path / "adapter", adapters, base=base)
    theirs = peft.PeftModel.from_pretrained(published(base), str(tmp_path / "adapter"))
    loaded = {name for name, _ in theirs.named_parameters() if ".lora_" in name}
    assert len(loaded) == len(adapters) == (4 * 2 if settings is SOME else 14 * 3)
    # LLaDA calls a layer of each block, and its head, ff_out.
    assert all(".blocks." in name or ".layers." in name for name in loaded)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    resaved, ours = load_file(tmp_path / "theirs" / WEIGHTS), load_file(tmp_path / "adapter" / WEIGHTS)
    assert resaved.keys() == ours.keys() and all(torch.equal(resaved[name], ours[name]) for name in ours)
    assert_merged_by_peft(theirs, base, adapters, model.lora)


@families
@torch.no_grad()
def test_round_trip_is_bit_exact(family: str, tmp_path: Path) -> None:
    base = save_base(family, tmp_path / "base")
    model, adapters = trained(family, base, use_dora=True)
    save_adapter(model, tmp_path / "adapter", adapters, base=base, card="# A card\n")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", WEIGHTS, "README.md"}
    assert (tmp_path / "adapter/README.md").read_text() == "# A card\n"
    for named in (None, Path(shutil.copytree(base, tmp_path / "copy"))):
        loaded = load_adapter(tmp_path / "adapter", named)
        assert not loaded.training and loaded.lora == model.lora
        assert torch.equal(loaded.token_logits(TOKENS), model.token_logits(TOKENS))
        trainable = {name: param for name, param in loaded.named_parameters() if param.requires_grad}
        assert trainable.keys() == adapters.keys()
        assert all(torch.equal(param, adapters[name]) for name, param in trainable.items())
    with pytest.raises(CheckpointError, match="adapter already exists; nothing is overwritten"):
        save_adapter(model, tmp_path / "adapter", adapters, base=base)


@torch.no_grad()
def test_a_bf16_base_keeps_its_fp32_adapters(adapter: Path) -> None:
    model = load_adapter(adapter, dtype=torch.bfloat16)
    assert all((p.dtype == torch.float32) == is_adapter(name) for name, p in model.named_parameters())
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.token_logits(TOKENS)
    torch.testing.assert_close(logits.float(), load_adapter(adapter).token_logits(TOKENS), atol=0.1, rtol=0)


@torch.no_grad()
def test_an_adapter_of_a_quantized_base_is_loaded_on_the_original(tmp_path: Path) -> None:
    sizes = SIZES | {"embed_dim": 256, "mlp_dim": 256, "num_layers": 1}
    plain = llada(**sizes)
    save_hf(plain, tmp_path / "base")
    quantized = lora_llada(**sizes, **ALL, quantize_base=True)
    adapters = {n: torch.randn_like(p) * 0.05 for n, p in quantized.named_parameters() if is_adapter(n)}
    save_adapter(quantized, tmp_path / "adapter", adapters, base=tmp_path / "base")
    loaded = load_adapter(tmp_path / "adapter")
    assert loaded.lora is not None and not loaded.lora.quantize_base
    expected = lora_llada(**sizes, **ALL)
    expected.load_state_dict(plain.state_dict() | adapters)
    assert torch.equal(loaded.token_logits(TOKENS), expected.eval().token_logits(TOKENS))


def changed_config(**changes: Any) -> Callable[[Path], None]:
    """Writes other values into adapter_config.json; ... removes a key."""

    def spoil(adapter: Path) -> None:
        file = adapter / "adapter_config.json"
        config = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))

    return spoil


def changed_tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    """Writes other tensors with the old metadata."""

    def spoil(adapter: Path) -> None:
        with safe_open(adapter / WEIGHTS, framework="pt") as file:
            metadata = file.metadata()
        save_file(change(load_file(adapter / WEIGHTS)), adapter / WEIGHTS, metadata=metadata)

    return spoil


TRANSFORMER = "base_model.model.model.transformer"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (changed_config(lora_alpha="4"), "has unusable settings"),
        (changed_config(lora_alpha=math.inf), "has unusable settings: lora_alpha must be above 0 and finite"),
        (changed_config(r=4.0), "has unusable settings: r must be a whole number, got 4.0"),
        (changed_config(r=...), r"adapter_config\.json has no key 'r'"),
        (changed_config(peft_type="LOHA"), r"peft_type is 'LOHA'; supported is 'LORA'"),
        (changed_config(alpha_pattern={"q_proj": 3}), r"alpha_pattern is {'q_proj': 3}; supported is {}"),
        (changed_config(init_lora_weights="pissa"), r"init_lora_weights is 'pissa'; supported is True"),
        (changed_config(base_model_name_or_path=3), "names no base"),
        (changed_config(base_model_name_or_path=None), "names no base. An adapter trained on random weights"),
        (lambda d: (d / "adapter_config.json").unlink(), r"adapter is no adapter: it has no adapter_config\.json"),
        (lambda d: (d / WEIGHTS).unlink(), r"adapter_model\.safetensors cannot be read"),
        (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-100]), "safetensors cannot be read"),
        (changed_tensors(lambda ts: {n: t * math.nan for n, t in ts.items()}), "not finite numbers"),
        (changed_tensors(lambda ts: {n: t.int() for n, t in ts.items()}), "not finite numbers"),
        (
            changed_tensors(lambda ts: {n: (t[:2] if "lora_A" in n else t[:, :2]).contiguous() for n, t in ts.items()}),
            r"does not fit its settings:\n  .*blocks\.0\.attn_out\.lora_A\.weight: \(2, 32\), needed \(4, 32\)",
        ),
        (
            changed_tensors(lambda ts: {n: t for n, t in ts.items() if "blocks.1.ff_out.lora_B" not in n}),
            r"does not fit its settings:\n  .*blocks\.1\.ff_out\.lora_B\.weight: missing, needed \(32, 4\)$",
        ),
        (
            changed_tensors(lambda ts: ts | {f"{TRANSFORMER}.ff_out.lora_A.weight": torch.ones(1)}),
            r"transformer\.ff_out\.lora_A\.weight: \(1,\), needed nothing$",
        ),
    ],
)
def test_unusable_adapters(adapter: Path, spoil: Any, message: str) -> None:
    spoil(adapter)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(adapter)


def test_another_base_is_refused(adapter: Path, base: Path, tmp_path: Path) -> None:
    other = save_base("llada", tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="was trained on other weights than those of .*other: give the directory"):
        load_adapter(adapter, other)
    with pytest.raises(CheckpointError, match="was trained on other weights than those of"):
        load_adapter(adapter, save_base("dream", tmp_path / "dream"))
    changed_config(base_model_name_or_path=str(tmp_path / "gone"))(adapter)
    with pytest.raises(CheckpointError, match="names the base .*gone, and there is no such directory.*--base"):
        load_adapter(adapter)
    load_adapter(adapter, base)


def test_the_base_is_named_by_its_absolute_path_or_as_on_the_hub(
    whole: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapters = trained("llada", whole / "base")
    monkeypatch.chdir(whole)
    save_adapter(model, tmp_path / "relative", adapters, base="base")
    monkeypatch.chdir(tmp_path)
    assert load_adapter("relative").lora == model.lora
    changed_config(base_model_name_or_path="GSAI-ML/LLaDA-8B-Base")(adapter)
    with pytest.raises(CheckpointError, match="names the base GSAI-ML/LLaDA-8B-Base, and there is no such directory"):
        load_adapter(adapter)
    shutil.copytree(whole / "base", "GSAI-ML/LLaDA-8B-Base")
    load_adapter(adapter)


@families
@torch.no_grad()
def test_an_adapter_that_peft_wrote(family: str, tmp_path: Path) -> None:
    base = save_base(family, tmp_path / "base")
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, lora_alpha=6, init_lora_weights=False)
    theirs = peft.get_peft_model(published(base), settings)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    ours = OpenedAdapter.open(tmp_path / "adapter", base)
    assert len(ours.tensors) == 4 * 2
    assert_merged_by_peft(theirs, base, ours.tensors, ours.settings)


def test_files_have_the_permissions_of_any_other(base: Path, tmp_path: Path) -> None:
    model, adapters = trained("llada", base)
    before = os.umask(0o027)
    try:
        save_adapter(model, tmp_path / "adapter", adapters, base=base, card="# A card")
        save_hf(load_hf(base), tmp_path / "hf")
    finally:
        os.umask(before)
    files = [*(tmp_path / "adapter").iterdir(), *(tmp_path / "hf").iterdir()]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}


def test_an_adapter_of_random_weights_names_no_base(base: Path, tmp_path: Path) -> None:
    model, adapters = trained("llada", base)
    save_adapter(model, tmp_path / "adapter", adapters, base=None)
    with pytest.raises(CheckpointError, match="names no base"):
        load_adapter(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="was trained on other weights"):
        load_adapter(tmp_path / "adapter", base)


def test_the_fingerprint_is_that_of_the_weights(tmp_path: Path) -> None:
    model = dream(**SIZES | {"num_layers": 1})
    save_hf(model, tmp_path / "whole")
    save_hf(model, tmp_path / "sharded", shard_bytes=10_000)
    assert len([*(tmp_path / "sharded").glob("*.safetensors")]) > 3
    original = HFCheckpoint(tmp_path / "whole").fingerprint()
    assert HFCheckpoint(tmp_path / "sharded").fingerprint() == original
    found = {original}
    for number, param in enumerate(model.parameters()):
        before = param.detach().clone()
        param.data.mul_(1 + 1e-3).add_(1e-3)
        save_hf(model, tmp_path / str(number))
        found.add(HFCheckpoint(tmp_path / str(number)).fingerprint())
        param.data.copy_(before)
    save_hf(model, tmp_path / "bf16", dtype=torch.bfloat16)
    found.add(HFCheckpoint(tmp_path / "bf16").fingerprint())
    assert len(found) == 2 + len([*model.parameters()])
