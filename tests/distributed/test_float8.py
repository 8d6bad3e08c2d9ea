"""A float8 target encoder on two gloo ranks: the embeddings, the average and the checkpoint of one process.

Products are emulated; a rank builds its encoder as the recipe does.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dllm_jepa.jepa import EMATargetEncoder
from dllm_jepa.models import InitialWeights, MaskedDiffusionLM, init_rope, use_float8
from dllm_jepa.models.dream import dream
from dllm_jepa.packing import PackedSequences
from dllm_jepa.training import CheckpointWriter, Ranks, SavedCheckpoint, TrainingState, full_tensors, materialize, shard
from tests.launching import on_ranks

SIZES = {"vocab_size": 50, "embed_dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 96}
LENGTHS = [7, 12, 3, 8]


def online_model(ranks: Ranks) -> MaskedDiffusionLM:
    with torch.device("meta"):
        model = dream(**SIZES, max_seq_len=16)
    shard(model, [*model.backbone.layers, model.head], ranks, torch.float32)
    fill(model, ranks, seed=0)
    return model


def fill(model: MaskedDiffusionLM, ranks: Ranks, seed: int) -> None:
    """Weights that are a few times those of a start, so that every layer counts."""
    weights = InitialWeights(model, seed=seed, std=0.1)
    materialize(model, weights.read, dtype=torch.float32, device=ranks.device)


def target_encoder(ranks: Ranks) -> EMATargetEncoder:
    with torch.device("meta"):
        backbone = dream(**SIZES, max_seq_len=16).backbone
    use_float8(backbone, emulate=True)
    shard(backbone, [*backbone.layers], ranks, torch.float32)
    materialize(backbone, None, dtype=torch.float32, device=ranks.device)
    init_rope(backbone)
    return EMATargetEncoder(backbone, ema_decay=0.9)


def embed(encoder: EMATargetEncoder) -> Tensor:
    num_tokens = sum(LENGTHS)
    tokens = torch.randint(0, 50, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    sequence_ids = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))[None]
    mask = PackedSequences.from_lengths(LENGTHS)
    return encoder.embed(tokens, sequence_ids, len(LENGTHS), mask=mask, input_pos=positions)


def find(folder: Path) -> None:
    """A rank, or a process alone: start, update, embed, save."""
    with Ranks.join("cpu") as ranks:
        online, encoder = online_model(ranks), target_encoder(ranks)
        encoder.copy_from(online.backbone)
        embedded = [embed(encoder)]
        fill(online, ranks, seed=1)
        encoder.update(online.backbone)
        embedded.append(embed(encoder))
        assert all(isinstance(w, DTensor) == (ranks.world_size > 1) for w in encoder.tensors().values())
        weights = dict(full_tensors(encoder.tensors()))
        state = TrainingState(
            nn.ModuleDict({"model": online}), torch.optim.SGD(online.parameters()), None, parts={"target": encoder}
        )
        writer = CheckpointWriter(folder, ranks, config_yaml="a: 1\n", fingerprint={"world_size": ranks.world_size})
        writer.save(1, state.tensors(), {"metrics": {}})
        writer.close()
        if ranks.is_rank_zero:
            torch.save({"embedded": embedded, "weights": weights}, folder / "found.pt")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have it: float8 may round the other way after a sum in another order
    find(one)
    torch.set_num_threads(threads)
    on_ranks(2, find, two)
    return one, two


def found(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "found.pt")


def test_the_embeddings_are_those_of_one_process(folders: tuple[Path, Path]) -> None:
    one, two = (found(folder)["embedded"] for folder in folders)
    assert [*map(torch.equal, one, two)] == [True, True]
    assert not torch.allclose(one[0], one[1], atol=1e-2), "the update does not show"


def test_the_average_is_that_of_one_process_without_float8(folders: tuple[Path, Path]) -> None:
    weights = [found(folder)["weights"] for folder in folders]
    alone = Ranks.join("cpu")
    online, encoder = online_model(alone), EMATargetEncoder(dream(**SIZES).backbone, ema_decay=0.9)
    encoder.copy_from(online.backbone)
    fill(online, alone, seed=1)
    encoder.update(online.backbone)
    for name, expected in encoder.tensors().items():
        assert all(torch.equal(found[name], expected) for found in weights), name
    assert all([*found] == [*encoder.tensors()] for found in weights)


def test_the_checkpoint_holds_the_average(folders: tuple[Path, Path]) -> None:
    for folder in folders:
        saved, weights = SavedCheckpoint(folder / "step_00000001"), found(folder)["weights"]
        names = [name for name in saved.tensors if name.startswith("target.")]
        assert sorted(names) == sorted(f"target.{name}" for name in weights)
        for name, weight in weights.items():
            assert torch.equal(saved.read(f"target.{name}", torch.float32), weight), name
