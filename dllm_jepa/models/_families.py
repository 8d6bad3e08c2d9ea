"""The families of backbones, by the `model_type` of their published config.json. A new one is its folder and a row."""

import pkgutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from dllm_jepa.models._masked_diffusion_lm import MaskedDiffusionLM
from dllm_jepa.models._sizes import TransformerSizes
from dllm_jepa.models._tokenizer import Tokenizer
from dllm_jepa.models.dream._builders import dream
from dllm_jepa.models.dream._convert_weights import dream_config, dream_hf_names, dream_sizes
from dllm_jepa.models.llada._builders import llada
from dllm_jepa.models.llada._convert_weights import llada_config, llada_hf_names, llada_sizes


@dataclass(frozen=True)
class Family:
    """How one family is built, read, written and used.

    Args:
        builder: builder that takes the sizes as arguments.
        hf_names: published weight name of every parameter, by our name.
        sizes: sizes from a published config.json; KeyError where a key is missing, ValueError where one is wrong.
        config: published config.json from sizes.
        tokenizer: dotted path of the function that makes the tokenizer of a checkpoint directory.
        decoding: dotted path of the builder of its decoding. A path, because `models` cannot import `generation`.
    """

    builder: Callable[..., MaskedDiffusionLM]
    hf_names: Callable[[TransformerSizes], dict[str, str]]
    sizes: Callable[[dict[str, Any]], TransformerSizes]
    config: Callable[[TransformerSizes], dict[str, Any]]
    tokenizer: str
    decoding: str

    def build(self, sizes: TransformerSizes) -> MaskedDiffusionLM:
        """A model of these sizes."""
        return self.builder(**asdict(sizes))


FAMILIES = {
    "llada": Family(
        llada,
        llada_hf_names,
        llada_sizes,
        llada_config,
        tokenizer="dllm_jepa.models.llada.llada_tokenizer",
        decoding="dllm_jepa.generation.llada_decoding",
    ),
    "Dream": Family(
        dream,
        dream_hf_names,
        dream_sizes,
        dream_config,
        tokenizer="dllm_jepa.models.dream.dream_tokenizer",
        decoding="dllm_jepa.generation.dream_decoding",
    ),
}
BUILT_IN_TOKENIZER = "dllm_jepa.models.tiny.tiny_tokenizer"


def known_tokenizers() -> list[str]:
    """Dotted paths of the functions that make a tokenizer of a directory."""
    return [*(family.tokenizer for family in FAMILIES.values()), BUILT_IN_TOKENIZER]


def find_tokenizer(path: str) -> Callable[..., Tokenizer] | None:
    """The function of a dotted path if `known_tokenizers` lists it, else None."""
    # The path may come from a file of somebody else, so it is compared as a whole: one that only starts like ours
    # leads, by way of a module's own imports, anywhere.
    function: Callable[..., Tokenizer] | None = pkgutil.resolve_name(path) if path in known_tokenizers() else None
    return function
