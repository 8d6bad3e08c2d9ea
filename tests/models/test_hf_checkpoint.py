"""Reading and writing the published layout: bit-exact round trips, and every way a directory can be wrong."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dllm_jepa.errors import CheckpointError
from dllm_jepa.models import FAMILIES, HFCheckpoint, TransformerSizes, load_hf, read_prompt, save_hf
from dllm_jepa.models.llada import llada

ASSETS = Path(__file__).parents[1] / "assets"
INDEX = "model.safetensors.index.json"
EMBEDDING = "backbone.tok_embeddings.weight"


def tensors_of(directory: Path) -> dict[str, Tensor]:
    found = {}
    for file in directory.glob("model-*.safetensors"):
        found |= load_file(file)
    return found


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ASSETS / "llada_tiny", tmp_path / "llada_tiny"))


def edit(directory: Path, **changes) -> None:
    """Other values in config.json; None removes a key."""
    config = json.loads((directory / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(kept))


def rewrite(directory: Path, change) -> None:
    """Apply `change` to all tensors, and write them as one file."""
    tensors = tensors_of(directory)
    change(tensors)
    for file in directory.glob("model*"):
        file.unlink()
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(("family", "copied"), [("llada", True), ("llada", False), ("dream", False)])
def test_round_trip_is_bit_exact(family: str, copied: bool, tmp_path: Path) -> None:
    source = ASSETS / f"{family}_tiny"
    model = load_hf(source)
    save_hf(model, tmp_path / "out", like=source if copied else None, shard_bytes=200_000)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in before.values())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    assert all(sum(t.nbytes for t in load_file(tmp_path / "out" / file).values()) <= 200_000 for file in files)
    assert load_hf(tmp_path / "out").sizes == model.sizes
    if copied:
        assert (tmp_path / "out/config.json").read_bytes() == (source / "config.json").read_bytes()
    else:
        ours, theirs = (json.loads((d / "config.json").read_text()) for d in (tmp_path / "out", source))
        assert {key for key in ours if key in theirs and ours[key] != theirs[key]} <= {"max_position_embeddings"}


def test_files_of_the_origin_are_copied_unchanged(checkpoint: Path, tmp_path: Path) -> None:
    kept = {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt", "modeling_llada.py"}
    for name in (*kept, "README.md", "notes.txt"):
        (checkpoint / name).write_text(f"contents of {name}")
    save_hf(load_hf(checkpoint), tmp_path / "out", like=checkpoint)
    copied = {file.name: file.read_text() for file in (tmp_path / "out").iterdir() if file.suffix != ".safetensors"}
    assert copied.keys() - {INDEX, "config.json"} == kept
    assert all(copied[name] == f"contents of {name}" for name in kept)


def test_the_prompt_format_goes_with_the_model(checkpoint: Path, tmp_path: Path) -> None:
    assert read_prompt(checkpoint) is None
    for number, prompt in enumerate([{"template": "chat", "system_prompt": "Be short."}, {"template": "plain"}]):
        save_hf(load_hf(checkpoint), tmp_path / str(number), prompt=prompt)
        assert read_prompt(tmp_path / str(number)) == {"system_prompt": None} | prompt
    for broken in ({"template": "xml"}, {"template": "chat", "system_prompt": 3}, [], "chat"):
        (checkpoint / "dllm_jepa.json").write_text(json.dumps({"prompt": broken}))
        with pytest.raises(CheckpointError, match=r"dllm_jepa\.json: prompt is .* must be an object with template"):
            read_prompt(checkpoint)


def test_rows_and_types_of_load_and_save(checkpoint: Path, tmp_path: Path) -> None:
    reader = HFCheckpoint(checkpoint)
    assert torch.equal(reader.read(EMBEDDING, slice(10, 20)), reader.read(EMBEDDING)[10:20])
    model = load_hf(checkpoint, torch.bfloat16)
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert model.backbone.layers[0].attn.pos_embeddings.cache.dtype == torch.float32
    save_hf(load_hf(checkpoint), tmp_path / "out", like=checkpoint, dtype=torch.bfloat16)
    stored = tensors_of(tmp_path / "out")
    for name, param in tensors_of(checkpoint).items():
        assert torch.equal(stored[name], param.bfloat16())


def test_no_more_than_a_file_of_tensors_is_in_memory(checkpoint: Path, tmp_path: Path) -> None:
    """Of all the weights that are handed over, only those of the file at hand are alive."""
    model = load_hf(checkpoint)
    handed_over: list[tuple[StorageWeakRef, int]] = []

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, weight in model.state_dict().items():
            assert sum(num_bytes for storage, num_bytes in handed_over if not storage.expired()) <= 100_000
            copy = weight.clone()
            handed_over.append((StorageWeakRef(copy.untyped_storage()), copy.nbytes))
            yield name, copy
            del copy

    save_hf(model, tmp_path / "out", like=checkpoint, weights=weights(), shard_bytes=100_000)
    assert len(handed_over) == len(tensors_of(checkpoint))
    assert len([*(tmp_path / "out").glob("*.safetensors")]) > 5
    before, after = tensors_of(checkpoint), tensors_of(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_save_hf_refuses(checkpoint: Path, tmp_path: Path) -> None:
    model = load_hf(checkpoint)
    with pytest.raises(AssertionError, match="arrived in place of"):
        save_hf(model, tmp_path / "out", weights=list(model.state_dict().items())[::-1])
    with pytest.raises(CheckpointError, match="already exists; nothing is overwritten"):
        save_hf(model, checkpoint)
    with pytest.raises(CheckpointError, match="model_type 'Dream', the configured model is of family 'llada'"):
        save_hf(model, tmp_path / "out", like=ASSETS / "dream_tiny")
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_a_full_disk_is_said_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dllm_jepa.models.files._directory.sync_files", full)
    with pytest.raises(CheckpointError, match="out cannot be written: .*No space left on device"):
        save_hf(load_hf(checkpoint), tmp_path / "out", like=checkpoint)
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_every_wrong_tensor_is_listed(checkpoint: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.transformer.ln_f.weight"]
        tensors["model.transformer.blocks.1.q_proj.bias"] = torch.zeros(64)
        tensors["model.transformer.wte.weight"] = torch.zeros(321, 64)

    rewrite(checkpoint, change)
    with pytest.raises(CheckpointError) as error:
        load_hf(checkpoint)
    for line in (
        "missing tensor model.transformer.ln_f.weight [64]",
        "unexpected tensor model.transformer.blocks.1.q_proj.bias",
        "tensor model.transformer.wte.weight has shape [321, 64], the model needs [320, 64]",
    ):
        assert line in str(error.value)


def test_architecture_must_match_the_configured_model(checkpoint: Path) -> None:
    sizes = {"vocab_size": 320, "embed_dim": 64, "num_layers": 4, "num_heads": 4, "mlp_dim": 128}
    HFCheckpoint(checkpoint).check(llada(**sizes))
    with pytest.raises(CheckpointError, match="rope_base is 500000.0 in config.json, 10000.0 in the configured model"):
        HFCheckpoint(checkpoint).check(llada(**sizes, rope_base=10_000.0))


def test_a_tied_head_may_be_stored_twice(checkpoint: Path) -> None:
    embedding, head = "model.transformer.wte.weight", "model.transformer.ff_out.weight"
    edit(checkpoint, weight_tying=True)
    file, tokens = checkpoint / "model.safetensors", torch.arange(6)[None]
    rewrite(checkpoint, lambda tensors: tensors.pop(head))
    tensors = load_file(file)
    expected = load_hf(checkpoint).token_logits(tokens)
    save_file(tensors | {head: tensors[embedding].clone()}, file)
    assert torch.equal(load_hf(checkpoint).token_logits(tokens), expected)
    save_file(tensors | {head: tensors[embedding] + 1}, file)
    with pytest.raises(CheckpointError, match=r"ff_out\.weight differs from .*wte\.weight, though config\.json ties"):
        load_hf(checkpoint)


def sizes_of(family: str, **changes: Any) -> TransformerSizes:
    """Sizes from the config.json of a family, with changes; ... removes a key."""
    config = json.loads((ASSETS / f"{family}_tiny/config.json").read_text()) | changes
    return FAMILIES[{"llada": "llada", "dream": "Dream"}[family]].sizes(
        {key: value for key, value in config.items() if value is not ...}
    )


def test_null_means_what_the_published_classes_make_of_it() -> None:
    """Source: LLaDAConfig and LLaDALlamaBlock (mlp_ratio * d_model), DreamConfig (as many heads as for queries)."""
    assert sizes_of("llada", mlp_hidden_size=None, mlp_ratio=3).mlp_dim == 3 * 64
    assert sizes_of("llada", mlp_hidden_size=..., mlp_ratio=...).mlp_dim == 4 * 64
    assert sizes_of("llada", n_heads=8, n_kv_heads=None).num_kv_heads == 8
    assert sizes_of("llada", vocab_size=300, embedding_size=None).vocab_size == 300
    assert sizes_of("dream", num_attention_heads=8, num_key_value_heads=None).num_kv_heads == 8
    assert not sizes_of("dream", tie_word_embeddings=None).tie_embeddings


def test_rope_theta_where_transformers_5_writes_it() -> None:
    rope = {"rope_type": "default", "rope_theta": 1234.0}
    assert sizes_of("dream", rope_theta=..., rope_parameters=rope).rope_base == 1234.0
    for family in ("llada", "dream"):
        assert sizes_of(family, rope_theta=1234.0, rope_parameters=rope).rope_base == 1234.0
        assert sizes_of(family, rope_theta=1234.0, rope_parameters=None, rope_scaling=None).rope_base == 1234.0
    for changes, message in (
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type in rope_parameters is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling is {'type': 'linear'"),
        ({"rope_theta": 99.0, "rope_parameters": rope}, "rope_theta is 99.0, and 1234.0 in rope_parameters"),
        ({"rope_parameters": [rope]}, "rope_parameters is .*must be an object"),
    ):
        with pytest.raises(ValueError, match=message):
            sizes_of("llada", **changes)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: shutil.rmtree(d), "llada_tiny does not exist"),
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not JSON: line 1"),
        (lambda d: edit(d, model_type="llama"), "model_type is 'llama'; known: Dream, llada"),
        (lambda d: edit(d, n_layers=None), "config.json has no key 'n_layers', which llada needs"),
        (lambda d: edit(d, n_layers="4"), "config.json: n_layers is '4'; it must be a whole number of at least 1"),
        (lambda d: edit(d, rms_norm_eps="1e-5"), "rms_norm_eps is '1e-5'; it must be a number above 0"),
        (lambda d: edit(d, weight_tying="no"), "weight_tying is 'no'; it must be true or false"),
        (lambda d: edit(d, num_experts=8), "num_experts is 8: this is a mixture of experts"),
        (lambda d: (d / "config.json").rename(d / "adapter_config.json"), "is an adapter, .*export .*--merged"),
        (lambda d: edit(d, block_type="sequential"), "block_type is 'sequential'; LLaDA backbones have 'llama'"),
        (lambda d: edit(d, n_heads=7), r"embed_dim \(64\) must be an even multiple of num_heads \(7\)"),
        (lambda d: (d / "model-00002-of-00002.safetensors").unlink(), "model-00002-of-00002.safetensors is missing"),
        (
            lambda d: (d / "model-00001-of-00002.safetensors").write_bytes(b"{"),
            "of-00002.safetensors is damaged or trunc",
        ),
        (lambda d: [file.unlink() for file in d.glob("model*")], "only safetensors are read"),
        (lambda d: (d / INDEX).write_text("{}"), "has no weight_map"),
        (lambda d: (d / INDEX).write_text('{"weight_map": {"a": "../b"}}'), "names files outside its directory"),
    ],
)
def test_unusable_directories(checkpoint: Path, spoil, message: str) -> None:
    spoil(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        load_hf(checkpoint)
