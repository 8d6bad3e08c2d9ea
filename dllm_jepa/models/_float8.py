"""Matrix products in float8, for a forward without gradient.

Shape legend: N tokens, I inputs and O outputs of a layer.
"""

from dataclasses import replace

from torch import nn

from dllm_jepa.errors import ConfigError

_MULTIPLE = 16  # torch._scaled_mm takes no other widths
# Attention averages the values of all tokens, so their rounding errors are in every token alike and do not cancel in a
# pooled embedding: most of its drift, for 15 % of the products of an 8B backbone.
_KEPT = ("v_proj", "output_proj")


def use_float8(module: nn.Module, *, emulate: bool = False) -> nn.Module:
    """Compute the products of linear layers in float8 (e4m3), in place; values and outputs of attention are left out.

    Parameters stay what and where they are, in the type that they are stored in, so that averaging, sharding, saving
    and exporting go on as before. In every forward, inputs and weights are scaled to the range of float8, rounded and
    multiplied; the result has the type of the inputs. Each token and each output has a scale of its own ([N, 1] and
    [1, O], powers of two), so that what is computed for a token does not depend on the others of its batch, and a
    token with huge values spoils no other.

    Call it before the module is compiled and sharded; returns it.

    Args:
        module: holds the linear layers; the meta device will do.
        emulate: round to float8 but multiply in fp32, on any device: slower than without float8, for measuring. Else
            it takes a GPU of compute capability 8.9 or more.

    Raises:
        ConfigError: if a layer has inputs or outputs that are no multiple of 16.

    Source: torchao's recipe "rowwise".
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # takes longer to import than torch

    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear) or not _is_converted(layer, name):
            continue
        if layer.in_features % _MULTIPLE or layer.out_features % _MULTIPLE:
            raise ConfigError(
                f"target_encoder.float8: true, but {name} has {layer.in_features} inputs and {layer.out_features} "
                f"outputs, and float8 products take multiples of {_MULTIPLE}: set float8: false, or sizes of the model "
                "that are such multiples (embed_dim, mlp_dim, and embed_dim / num_heads * num_kv_heads)"
            )
    rowwise = replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=emulate)
    converted: nn.Module = convert_to_float8_training(module, config=rowwise, module_filter_fn=_is_converted)
    return converted


def _is_converted(_: nn.Module, name: str) -> bool:
    return name.rpartition(".")[2] not in _KEPT
