"""Adapters in PEFT's layout: loaded by PEFT itself onto the published names, and every way they can be wrong."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dllm_jepa.errors import CheckpointError
from dllm_jepa.models import HFCheckpoint, MaskedDiffusionLM, is_adapter, load_adapter, load_hf, save_adapter, save_hf
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
kinds = pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])


class Norm(nn.Module):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def attention(q: Tensor, k: Tensor, v: Tensor, base: float) -> Tensor:
    """4 query heads, 2 of keys and values, of size 8; every pair of sizes i and i + 4 is turned."""
    q, k, v = (x.unflatten(-1, (-1, 8)).transpose(1, 2) for x in (q, k, v))
    angles = torch.arange(q.size(2))[:, None] * base ** (-torch.arange(4) / 4)
    turns = torch.polar(torch.ones_like(angles), angles)
    q, k = (torch.view_as_real(torch.complex(x[..., :4], x[..., 4:]) * turns).mT.flatten(-2) for x in (q, k))
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class LLaDABlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.attn_out = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.k_proj, self.v_proj = nn.Linear(32, 16, bias=False), nn.Linear(32, 16, bias=False)
        self.ff_proj, self.up_proj = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False)
        self.ff_out = nn.Linear(48, 32, bias=False)
        self.attn_norm, self.ff_norm = Norm(1e-5), Norm(1e-5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn_norm(x)
        x = x + self.attn_out(attention(self.q_proj(y), self.k_proj(y), self.v_proj(y), 500_000.0))
        y = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(y)) * self.up_proj(y))


class PublishedLLaDA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(48, 32),
                "blocks": nn.ModuleList(LLaDABlock() for _ in range(2)),
                "ln_f": Norm(1e-5),
                "ff_out": nn.Linear(32, 48, bias=False),
            }
        )

    def forward(self, tokens: Tensor) -> Tensor:
        parts = self.model.transformer
        x = parts["wte"](tokens)
        for block in parts["blocks"]:
            x = block(x)
        return parts["ff_out"](parts["ln_f"](x))


class DreamAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        self.k_proj, self.v_proj = nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), 1_000_000.0))


class DreamMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False)
        self.down_proj = nn.Linear(48, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DreamLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = DreamAttention(), DreamMLP()
        self.input_layernorm, self.post_attention_layernorm = Norm(1e-6), Norm(1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class PublishedDream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(48, 32)
        self.model.layers = nn.ModuleList(DreamLayer() for _ in range(2))
        self.model.norm = Norm(1e-6)
        self.lm_head = nn.Linear(32, 48, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x)
        return self.lm_head(self.model.norm(x))


PUBLISHED: dict[str, Any] = {"llada": PublishedLLaDA, "dream": PublishedDream}


def raw_logits(model: MaskedDiffusionLM) -> Tensor:
    """Scores in the order of the hidden states, as the published classes return them."""
    hidden = model(TOKENS)
    return model.head(hidden)


def save_base(family: str, directory: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = BUILDERS[family][0](**SIZES)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.normal_(std=0.1).add_(name.endswith("scale"))
    save_hf(model, directory)
    return directory


def published(family: str, base: Path) -> nn.Module:
    """The published class on the weights of a directory: strict, so that every name is right."""
    model: nn.Module = PUBLISHED[family]()
    model.load_state_dict({k: v for file in base.glob("*.safetensors") for k, v in load_file(file).items()})
    return model.eval()


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


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base("llada", tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    model, adapters = trained("llada", base)
    save_adapter(model, tmp_path / "adapter", adapters, base=base)
    return tmp_path / "adapter"


@families
@kinds
@pytest.mark.parametrize("settings", [ALL, SOME], ids=["all", "some"])
@torch.no_grad()
def test_peft_loads_them_on_the_published_names(family: str, use_dora: bool, settings: Any, tmp_path: Path) -> None:
    base = save_base(family, tmp_path / "base")
    tree = published(family, base)
    plain = raw_logits(load_hf(base))
    torch.testing.assert_close(tree(TOKENS), plain, atol=1e-5, rtol=0)
    model, adapters = trained(family, base, **settings, use_dora=use_dora)
    expected = raw_logits(model)
    assert (expected - plain).abs().max() > 0.05
    save_adapter(model, tmp_path / "adapter", adapters, base=base)
    theirs = peft.PeftModel.from_pretrained(tree, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(theirs(TOKENS), expected, atol=1e-5, rtol=0)
    loaded = {name for name, _ in theirs.named_parameters() if ".lora_" in name}
    assert len(loaded) == len(adapters) == (14 if settings is ALL else 4) * (3 if use_dora else 2)
    # LLaDA calls a layer of each block, and its head, ff_out.
    assert all(".blocks." in name or ".layers." in name for name in loaded)
    head = theirs.base_model.model.model.transformer["ff_out"] if family == "llada" else theirs.base_model.model.lm_head
    assert type(head) is nn.Linear
    theirs.save_pretrained(str(tmp_path / "theirs"))
    resaved, ours = load_file(tmp_path / "theirs" / WEIGHTS), load_file(tmp_path / "adapter" / WEIGHTS)
    assert resaved.keys() == ours.keys() and all(torch.equal(resaved[name], ours[name]) for name in ours)
    torch.testing.assert_close(theirs.merge_and_unload()(TOKENS), expected, atol=1e-5, rtol=0)


@families
@kinds
@torch.no_grad()
def test_round_trip_is_bit_exact(family: str, use_dora: bool, tmp_path: Path) -> None:
    base = save_base(family, tmp_path / "base")
    model, adapters = trained(family, base, use_dora=use_dora)
    save_adapter(model, tmp_path / "adapter", adapters, base=base, card="# A card\n")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", WEIGHTS, "README.md"}
    assert (tmp_path / "adapter/README.md").read_text() == "# A card\n"
    shutil.copytree(base, tmp_path / "copy")
    for named in (None, base, tmp_path / "copy"):
        loaded = load_adapter(tmp_path / "adapter", named)
        assert not loaded.training and loaded.lora == model.lora
        assert torch.equal(loaded.token_logits(TOKENS), model.token_logits(TOKENS))
        trainable = {name: param for name, param in loaded.named_parameters() if param.requires_grad}
        assert trainable.keys() == adapters.keys()
        assert all(torch.equal(param, adapters[name]) for name, param in trainable.items())


@torch.no_grad()
def test_a_bf16_base_keeps_its_fp32_adapters(adapter: Path) -> None:
    model = load_adapter(adapter, dtype=torch.bfloat16)
    assert all((p.dtype == torch.float32) == is_adapter(name) for name, p in model.named_parameters())
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.token_logits(TOKENS)
    torch.testing.assert_close(logits.float(), load_adapter(adapter).token_logits(TOKENS), atol=0.1, rtol=0)


@families
@torch.no_grad()
def test_an_adapter_of_a_quantized_base_is_loaded_on_the_original(family: str, tmp_path: Path) -> None:
    sizes = SIZES | {"embed_dim": 256, "mlp_dim": 256, "num_layers": 1}
    plain = BUILDERS[family][0](**sizes)
    save_hf(plain, tmp_path / "base")
    quantized = BUILDERS[family][1](**sizes, **ALL, quantize_base=True)
    adapters = {n: torch.randn_like(p) * 0.05 for n, p in quantized.named_parameters() if is_adapter(n)}
    save_adapter(quantized, tmp_path / "adapter", adapters, base=tmp_path / "base")
    loaded = load_adapter(tmp_path / "adapter")
    assert loaded.lora is not None and not loaded.lora.quantize_base
    expected = BUILDERS[family][1](**sizes, **ALL)
    expected.load_state_dict(plain.state_dict() | adapters)
    assert torch.equal(loaded.token_logits(TOKENS), expected.eval().token_logits(TOKENS))


def rewrite(adapter: Path, tensors: dict[str, Tensor]) -> None:
    """Other tensors with the old metadata."""
    with safe_open(adapter / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, adapter / WEIGHTS, metadata=metadata)


def other_rank(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    rewrite(adapter, {n: (t[:2] if "lora_A" in n else t[:, :2]).contiguous() for n, t in tensors.items()})


def without_one(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    tensors.pop("base_model.model.model.transformer.blocks.1.ff_out.lora_B.weight")
    rewrite(adapter, tensors)


def with_one_more(adapter: Path) -> None:
    rewrite(
        adapter,
        load_file(adapter / WEIGHTS) | {"base_model.model.model.transformer.ff_out.lora_A.weight": torch.ones(1)},
    )


def name_no_base(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))


def changed_config(name: str, value: Any) -> Callable[[Path], None]:
    def spoil(adapter: Path) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))

    return spoil


def not_a_number(adapter: Path) -> None:
    rewrite(adapter, {name: torch.full_like(tensor, math.nan) for name, tensor in load_file(adapter / WEIGHTS).items()})


def integers(adapter: Path) -> None:
    rewrite(adapter, {name: tensor.int() for name, tensor in load_file(adapter / WEIGHTS).items()})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (changed_config("lora_alpha", "4"), "has unusable settings"),
        (changed_config("lora_alpha", math.inf), "has unusable settings: lora_alpha must be above 0 and finite"),
        (changed_config("r", 4.0), "has unusable settings: r must be a whole number, got 4.0"),
        (changed_config("r", 8), r"does not fit its settings"),
        (changed_config("peft_type", "LOHA"), r"peft_type is 'LOHA'; supported is 'LORA'"),
        (changed_config("use_rslora", True), r"use_rslora is True; supported is False"),
        (changed_config("alpha_pattern", {"q_proj": 3}), r"alpha_pattern is {'q_proj': 3}; supported is {}"),
        (changed_config("init_lora_weights", "pissa"), r"init_lora_weights is 'pissa'; supported is True"),
        (changed_config("base_model_name_or_path", 3), "names no base"),
        (not_a_number, "not finite numbers"),
        (integers, "not finite numbers"),
        (lambda d: (d / "adapter_config.json").unlink(), r"adapter is no adapter: it has no adapter_config\.json"),
        (lambda d: shutil.rmtree(d), r"adapter is no adapter: it has no adapter_config\.json"),
        (lambda d: (d / "adapter_config.json").write_text("{"), r"adapter_config\.json is not JSON"),
        (name_no_base, "names no base. An adapter trained on random weights"),
        (lambda d: (d / WEIGHTS).unlink(), r"adapter_model\.safetensors cannot be read"),
        (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-100]), "safetensors cannot be read"),
        (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:5]), "safetensors cannot be read"),
        (
            other_rank,
            r"does not fit its settings:\n  .*blocks\.0\.attn_out\.lora_A\.weight: \(2, 32\), needed \(4, 32\)",
        ),
        (without_one, r"does not fit its settings:\n  .*blocks\.1\.ff_out\.lora_B\.weight: missing, needed \(32, 4\)$"),
        (with_one_more, r"transformer\.ff_out\.lora_A\.weight: \(1,\), needed nothing$"),
    ],
)
def test_unusable_adapters(adapter: Path, spoil: Any, message: str) -> None:
    spoil(adapter)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(adapter)


def test_another_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = save_base("llada", tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="was trained on other weights than those of .*other: give the directory"):
        load_adapter(adapter, other)
    with pytest.raises(CheckpointError, match="was trained on other weights than those of"):
        load_adapter(adapter, save_base("dream", tmp_path / "dream"))
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(CheckpointError, match="names the base .*base, and there is no such directory.*--base"):
        load_adapter(adapter)
    load_adapter(adapter, tmp_path / "moved")


def test_the_base_is_named_by_its_absolute_path(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapters = trained("llada", base)
    monkeypatch.chdir(tmp_path)
    save_adapter(model, "adapter", adapters, base="base")
    monkeypatch.chdir("/")
    assert load_adapter(tmp_path / "adapter").lora == model.lora


def test_a_base_of_the_hub_is_a_directory_of_its_name(
    adapter: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed_config("base_model_name_or_path", "GSAI-ML/LLaDA-8B-Base")(adapter)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="names the base GSAI-ML/LLaDA-8B-Base, and there is no such directory"):
        load_adapter(adapter)
    shutil.copytree(base, "GSAI-ML/LLaDA-8B-Base")
    load_adapter(adapter)


@families
@torch.no_grad()
def test_an_adapter_that_peft_wrote(family: str, tmp_path: Path) -> None:
    base = save_base(family, tmp_path / "base")
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, lora_alpha=6, init_lora_weights=False)
    theirs = peft.get_peft_model(published(family, base), settings).eval()
    theirs.save_pretrained(str(tmp_path / "adapter"))
    ours = load_adapter(tmp_path / "adapter", base)
    torch.testing.assert_close(raw_logits(ours), theirs(TOKENS), atol=1e-5, rtol=0)
    assert (raw_logits(ours) - raw_logits(load_hf(base))).abs().max() > 0.05


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


class FullDisk:
    """A tokenizer whose second file does not fit."""

    def save(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{}")
        raise OSError(28, "No space left on device")


def test_what_cannot_be_written_leaves_nothing_behind(adapter: Path, base: Path, tmp_path: Path) -> None:
    model, adapters = trained("llada", base)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    tokenizer: Any = FullDisk()
    with pytest.raises(CheckpointError, match="new/adapter cannot be written: .*No space left on device"):
        save_adapter(model, tmp_path / "new/adapter", adapters, base=None, tokenizer=tokenizer)
    with pytest.raises(CheckpointError, match="adapter already exists; nothing is overwritten"):
        save_adapter(model, adapter, adapters, base=base)
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        save_adapter(model, tmp_path / "third", adapters, base=tmp_path / "nowhere")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "new"}
    assert [*(tmp_path / "new").iterdir()] == []
    save_adapter(model, tmp_path / "new/adapter", adapters, base=base)


@families
def test_the_fingerprint_is_that_of_the_weights(family: str, tmp_path: Path) -> None:
    base = save_base(family, tmp_path / "base")
    original = HFCheckpoint(base).fingerprint()
    shutil.copytree(base, tmp_path / "copy")
    model = load_hf(base)
    save_hf(model, tmp_path / "sharded", shard_bytes=10_000)
    assert len([*(tmp_path / "sharded").glob("*.safetensors")]) > 3
    assert HFCheckpoint(tmp_path / "copy").fingerprint() == HFCheckpoint(tmp_path / "sharded").fingerprint() == original
    found = {original}
    for number, param in enumerate(model.parameters()):
        before = param.detach().clone()
        with torch.no_grad():
            param.mul_(1 + 1e-3)
        save_hf(model, tmp_path / str(number))
        found.add(HFCheckpoint(tmp_path / str(number)).fingerprint())
        param.data.copy_(before)
    assert len(found) == 1 + len([*model.parameters()])
    save_hf(model, tmp_path / "bf16", dtype=torch.bfloat16)
    assert HFCheckpoint(tmp_path / "bf16").fingerprint() not in found
