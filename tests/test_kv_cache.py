"""Keys and values kept between passes, in both families and rows of different lengths."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dllm_jepa.kv_cache import KVCache
from dllm_jepa.models import MaskedDiffusionLM, load_hf

ASSETS = Path(__file__).parent / "assets"
LENGTHS = torch.tensor([9, 6, 7])
FED = torch.tensor([[2, 3, 4, 5], [0, 1, 2, 3], [3, 4, 5, 6]])


@pytest.fixture(scope="module", params=["llada", "dream"])
def model(request: pytest.FixtureRequest) -> MaskedDiffusionLM:
    return load_hf(ASSETS / f"{request.param}_tiny").double().eval().requires_grad_(False)


def rows() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    return tokens, torch.arange(9) < LENGTHS[:, None]


def at(columns: Tensor, width: int) -> Tensor:
    return (torch.arange(len(columns))[:, None] * width + columns).flatten()


def test_whole_rows_are_as_without_a_cache(model: MaskedDiffusionLM) -> None:
    tokens, real = rows()
    expected = model(tokens, attention_mask=real)
    for cache in (KVCache(real), KVCache(real)):
        for _ in range(2):  # the second pass takes the place of the first
            assert torch.equal(model(tokens, attention_mask=cache), expected)
    assert torch.equal(model(tokens[:1], attention_mask=KVCache(None)), model(tokens[:1]))


def test_fed_columns_of_unchanged_rows_are_exact(model: MaskedDiffusionLM) -> None:
    tokens, real = rows()
    cache = KVCache(real)
    hidden = model(tokens, attention_mask=cache)
    logits = model.logits(hidden, at(FED[:, 1:], 9), attention_mask=cache)
    fed_hidden = model(tokens.gather(1, FED), attention_mask=cache, input_pos=FED)
    fed_logits = model.logits(fed_hidden, at(torch.arange(1, 4).expand(3, 3), 4), attention_mask=cache)
    torch.testing.assert_close(fed_hidden, hidden[torch.arange(3)[:, None], FED])
    torch.testing.assert_close(fed_logits, logits)


def test_the_first_token_is_scored_as_in_whole_rows(model: MaskedDiffusionLM) -> None:
    """A shifted model scores it from its own state, and a row that is not fed from its start has no such token."""
    tokens, real = rows()
    cache = KVCache(real)
    expected = model.logits(model(tokens, attention_mask=cache), torch.tensor([9]), attention_mask=cache)
    fed = model(tokens.gather(1, FED), attention_mask=cache, input_pos=FED)
    given = model.logits(fed, torch.tensor([4]), attention_mask=cache)
    torch.testing.assert_close(given, expected)


def test_what_is_fed_is_replaced_and_the_rest_stays_as_it_was(model: MaskedDiffusionLM) -> None:
    """Against a full pass in which every layer's old projections are put back where nothing was fed."""
    tokens, real = rows()
    changed = tokens.scatter(1, FED, tokens.gather(1, FED).flip(1))
    cache = KVCache(real)
    old: dict[torch.nn.Module, Tensor] = {}
    is_fed = torch.zeros(3, 9, 1, dtype=torch.bool).scatter(1, FED[..., None], True)

    def keep_old(module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        old[module] = torch.where(is_fed, output, old[module]) if module in old else output
        return old[module]

    model(tokens, attention_mask=cache)
    fed = model(changed.gather(1, FED), attention_mask=cache, input_pos=FED)
    again = model(changed.gather(1, FED), attention_mask=cache, input_pos=FED)
    handles = [
        projection.register_forward_hook(keep_old)
        for layer in model.backbone.layers
        for projection in (layer.attn.k_proj, layer.attn.v_proj)
    ]
    model(tokens, attention_mask=real)
    stale = model(changed, attention_mask=real)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(fed, stale[torch.arange(3)[:, None], FED])
    torch.testing.assert_close(again, fed)
    exact = model(changed, attention_mask=real)
    assert not torch.allclose(fed, exact[torch.arange(3)[:, None], FED])


def test_rows_that_are_not_kept_leave_the_others_as_they_are(model: MaskedDiffusionLM) -> None:
    tokens, real = rows()
    outs = []
    for kept in ([0, 1, 2], [2, 0]):
        cache = KVCache(real)
        model(tokens, attention_mask=cache)
        cache.keep(kept)
        fed, columns = tokens.gather(1, FED).flip(1)[kept], FED[kept]
        for _ in range(2):
            hidden = model(fed, attention_mask=cache, input_pos=columns)
        outs.append(hidden)
    torch.testing.assert_close(outs[1], outs[0][[2, 0]])
    unpadded = KVCache(None)
    model(tokens, attention_mask=unpadded)
    unpadded.keep([1])
    assert unpadded.key_mask is None


def test_columns_before_whole_rows_are_refused(model: MaskedDiffusionLM) -> None:
    tokens, real = rows()
    with pytest.raises(ValueError, match="must be filled by a pass over whole rows"):
        model(tokens.gather(1, FED), attention_mask=KVCache(real), input_pos=FED)
