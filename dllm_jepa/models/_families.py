"""The families of backbones, by the `model_type` of their published config.json. A new family is one more row."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from dllm_jepa.models._layers import TransformerSizes
from dllm_jepa.models._masked_diffusion_lm import MaskedDiffusionLM
from dllm_jepa.models.dream._component_builders import dream
from dllm_jepa.models.dream._convert_weights import dream_config, dream_hf_names, dream_sizes
from dllm_jepa.models.llada._component_builders import llada
from dllm_jepa.models.llada._convert_weights import llada_config, llada_hf_names, llada_sizes


@dataclass(frozen=True)
class Family:
    """How one family is built, read and written.

    Args:
        builder: size-free component builder.
        hf_names: published weight name of every parameter, by our name.
        sizes: sizes from a published config.json; raises KeyError for a missing key.
        config: published config.json from sizes.
    """

    builder: Callable[..., MaskedDiffusionLM]
    hf_names: Callable[[TransformerSizes], dict[str, str]]
    sizes: Callable[[dict[str, Any]], TransformerSizes]
    config: Callable[[TransformerSizes], dict[str, Any]]

    def build(self, sizes: TransformerSizes) -> MaskedDiffusionLM:
        """A model of these sizes."""
        return self.builder(**asdict(sizes))


FAMILIES = {
    "llada": Family(llada, llada_hf_names, llada_sizes, llada_config),
    "Dream": Family(dream, dream_hf_names, dream_sizes, dream_config),
}
