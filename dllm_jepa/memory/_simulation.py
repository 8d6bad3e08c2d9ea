"""The memory of one micro-batch and of an optimizer, simulated.

The real forward and backward run on fake tensors, which have shapes but no data, while the bytes of all live storages
are added up; an optimizer takes real steps on small stand-ins for the parameters.

Shape legend: S sequences, B rows and T tokens of a row, n masked tokens, D hidden.
"""

import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from dllm_jepa.jepa import GlobalCounts, ViewSampler, jepa_loss, masked_token_weights, pool
from dllm_jepa.models import DTYPES, Backbone, MaskedDiffusionLM, set_packed_attention
from dllm_jepa.packing import PackedSequences

_DRAWS = 1000  # of the view sampler
_SAMPLE = 2**20  # elements
# Elements of a stand-in: a multiple of every block size in use, and far above the smallest tensor that is quantized.
_STAND_IN = 65_536


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of the storages that are made while it is active, from their birth to their death.

    A storage that was there before counts nothing: it is first seen as an argument.
    """

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and enter what it made."""
        for leaf in tree_leaves((args, kwargs)):
            self._enter(leaf, counts=False)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            self._enter(leaf, counts=True)
        return out

    def _enter(self, leaf: object, *, counts: bool) -> None:
        if not isinstance(leaf, Tensor):
            return
        if is_traceable_wrapper_subclass(leaf):
            for name in leaf.__tensor_flatten__()[0]:
                self._enter(getattr(leaf, name), counts=counts)
            return
        storage = leaf.untyped_storage()
        address = storage._cdata
        if address in self._seen:
            return
        num_bytes = storage.nbytes() if counts else 0
        self._seen.add(address)
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, address, num_bytes)

    def _leave(self, address: int, num_bytes: int) -> None:
        self._seen.discard(address)
        self.live -= num_bytes


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of the data of a tensor; of a quantized one those of the tensors inside it. The meta device will do."""
    if is_traceable_wrapper_subclass(tensor):
        return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def build_parts(cfg: Any) -> tuple[MaskedDiffusionLM, nn.Module | None]:
    """The online model, and the predictor if there is one, on the meta device."""
    with torch.device("meta"):
        model: MaskedDiffusionLM = cfg.model.build()
        sizes = model.sizes
        predictor = cfg.predictor.build(sizes.embed_dim, sizes.mlp_dim) if cfg.jepa_weight > 0 else None
    return model, predictor


def optimizer_state_bytes(cfg: Any, sizes: list[int]) -> int:
    """Bytes of the optimizer's state for parameters of these many elements: that of a stand-in for each size."""
    counts = [size if size <= _STAND_IN else _STAND_IN + size % _STAND_IN for size in sizes]
    measured = {count: _step_stand_ins(cfg, [count])[0] for count in set(counts)}
    return sum(measured[count] * size // count for count, size in zip(counts, sizes, strict=True))


def optimizer_step_bytes(cfg: Any, sizes: list[int]) -> int:
    """Bytes of the temporaries of the optimizer's step.

    They are those of one parameter at a time, or of all together: what a third stand-in adds tells. Not a second one: a
    loop over parameters may hold on to what it made for the one before.
    """
    two, three = (_step_stand_ins(cfg, [_STAND_IN] * number)[1] for number in (2, 3))
    together = three - two
    return (together * sum(sizes) + (two - 2 * together) * max(sizes)) // _STAND_IN


def _step_stand_ins(cfg: Any, counts: list[int]) -> tuple[int, int]:
    """Bytes of the optimizer's state for stand-ins, and of the temporaries of its second step."""
    params = [nn.Parameter(torch.zeros(count, dtype=DTYPES[cfg.dtype])) for count in counts]
    optimizer: torch.optim.Optimizer = cfg.optimizer.build(params)
    for group in optimizer.param_groups:
        if cfg.device == "cuda" and group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True  # what torch takes on a GPU when nothing is said
    for param in params:
        param.grad = torch.zeros_like(param)
    with torch.compiler.set_stance("force_eager"):  # torchao compiles for minutes
        optimizer.step()
        with (storages := LiveStorages()):
            optimizer.step()
    states = [[value for value in optimizer.state[p].values() if isinstance(value, Tensor)] for p in params]
    state_bytes = sum(stored_bytes(value) for values in states for value in values)
    if quantized := [value.numel() for value in states[0] if is_traceable_wrapper_subclass(value)]:
        # Compiled, torchao's step writes to memory only its new moments, in fp32: a block has to be whole before it is
        # quantized. So says the code that inductor generates for AdamW8bit; uncompiled it takes five times as much.
        return state_bytes, sum(quantized) * torch.float32.itemsize
    return state_bytes, storages.peak


class _FusedRMSNorm(torch.autograd.Function):
    """Allocates what the CUDA kernel does; the CPU's RMSNorm is made of many operators, each with its output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1]))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty_like(grad)


class _LikeCUDA(TorchFunctionMode):
    """Lets fake CPU tensors be normalized as CUDA tensors, which without a CUDA build of torch have no autograd."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.rms_norm and kwargs.get("weight") is None:
            return _FusedRMSNorm.apply(args[0])  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


def _run_like_cuda(backbone: Backbone, compute_dtype: torch.dtype) -> None:
    """Give attentions a kernel of GPUs, and put layers and norm under `_LikeCUDA`.

    Each on its own, for a mode around a whole backward is off inside it.
    """
    if compute_dtype == torch.bfloat16:
        set_packed_attention(backbone, "varlen")  # flex attention would add a mask of [N, N] bytes

    def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with _LikeCUDA():
                return forward(*args, **kwargs)

        return run

    for module in (*backbone.layers, backbone.norm):
        module.forward = wrapped(module.forward)


def micro_batch_peak(cfg: Any, num_gpus: int, *, with_logits: bool) -> int:
    """Peak of what target branch, forward and backward of one micro-batch allocate.

    It is one of `tokens_per_device` tokens, of sequences as long as they may be, all of whose tokens may be masked.
    Gradients are there already, as from a micro-batch before, so that only the newest of a weight counts.

    With several GPUs, weights are in the compute type and have no gradient in another type; `with_logits` adds the head
    and its loss.
    """
    length = min(cfg.max_seq_len, cfg.tokens_per_device)
    number, rest = divmod(cfg.tokens_per_device, length)
    lengths = [length] * number + ([rest] if cfg.packed and rest else [])
    packing = PackedSequences.from_lengths(lengths)
    model, predictor = build_parts(cfg)
    adapters = not all(param.requires_grad for param in model.parameters())
    target = model if adapters else build_parts(cfg)[0]
    dtype, compute_dtype = DTYPES[cfg.dtype], DTYPES[cfg.compute_dtype]
    if cfg.device == "cpu" or compute_dtype == torch.float32:
        _ = packing.bucket_positions  # it and the buckets are computed here, where tensors have data
    sharded = num_gpus > 1
    in_backward = cfg.optimizer_in_bwd
    update_bytes = optimizer_step_bytes(cfg, [_SAMPLE]) / _SAMPLE if in_backward else None
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mismatch dtype", category=UserWarning)  # of the predictor's norms
        if not adapters:
            average = DTYPES[cfg.target_encoder.argument("dtype") or "fp32"] if cfg.jepa_weight > 0 else dtype
            _put_fakes(target, compute_dtype if sharded else average, compute_dtype)
            target.requires_grad_(False)
        for module in (model, *([] if predictor is None else [predictor])):
            _put_fakes(module, compute_dtype if sharded else dtype, compute_dtype)
            _prepare_gradients(module, update_bytes=update_bytes)
        if cfg.device == "cuda":
            _run_like_cuda(model.backbone, compute_dtype)
            _run_like_cuda(target.backbone, compute_dtype)
        if cfg.enable_activation_checkpointing:
            model.checkpoint_layers()
        shape = (1, sum(lengths)) if cfg.packed else (number, length)
        batch = _Batch(
            tokens=torch.zeros(shape, dtype=torch.int64),
            mask=packing if cfg.packed else torch.ones(shape, dtype=torch.bool),
            masked=torch.zeros(math.ceil(_context_ratio(cfg) * sum(lengths)), dtype=torch.int64),
            num_sequences=len(lengths),
        )
        enabled = compute_dtype == torch.bfloat16 and not sharded

        def autocast() -> AbstractContextManager[None]:
            return torch.autocast("cpu", torch.bfloat16, enabled=enabled)

        with (storages := LiveStorages()):
            _run(cfg, batch, model, predictor, target, autocast, with_logits=with_logits)
    return storages.peak


@dataclass(frozen=True)
class _Batch:
    """A micro-batch: tokens [B, T] (also for everything else of that shape), masked positions [n], and its bounds."""

    tokens: Tensor
    mask: PackedSequences | Tensor
    masked: Tensor
    num_sequences: int


def _run(
    cfg: Any,
    batch: _Batch,
    model: MaskedDiffusionLM,
    predictor: nn.Module | None,
    target: MaskedDiffusionLM,
    autocast: Callable[[], AbstractContextManager[None]],
    *,
    with_logits: bool,
) -> None:
    """The recipe's calls for one micro-batch."""
    tokens, size, norm = batch.tokens, batch.num_sequences, cfg.pooled_layer_norm
    if predictor is not None:
        with autocast(), torch.no_grad():
            hidden = target.backbone(tokens, mask=batch.mask, input_pos=tokens)
            embedded = pool(hidden, tokens, size, layer_norm=norm)
            del hidden
    counts = GlobalCounts(size, max(len(batch.masked), 1), tokens.numel(), tokens.numel(), tokens.numel())
    per_sequence = torch.ones(size, dtype=torch.int64)
    weights = masked_token_weights(
        cfg.loss_weight,
        counts,
        sequence_of_masked=batch.masked,
        mask_ratio=per_sequence.float(),
        num_masked=per_sequence,
        num_maskable=per_sequence,
    )
    losses: list[Tensor] = []
    with autocast():
        hidden = model(tokens, attention_mask=batch.mask, input_pos=tokens)
        if with_logits:
            diffusion_loss, _ = model.score(
                hidden,
                batch.masked,
                labels=batch.masked,
                token_weights=weights,
                chunk_tokens=cfg.logits_chunk_tokens,
                attention_mask=batch.mask,
            )
            losses.append(diffusion_loss)
        if predictor is not None:
            pred = predictor(pool(hidden, tokens, size, layer_norm=norm).to(hidden.dtype))
            losses.append(cfg.jepa_weight * jepa_loss(embedded, pred, counts))
    (torch.stack(losses).sum() if losses else hidden.sum()).backward()


def _put_fakes(module: nn.Module, trained: torch.dtype, frozen: torch.dtype) -> None:
    """Put fake tensors of the given types in the place of parameters and buffers; for quantized ones dense ones."""
    for submodule in module.modules():
        for name, param in list(submodule.named_parameters(recurse=False)):
            dtype = trained if param.requires_grad else frozen
            fake = nn.Parameter(torch.empty(param.shape, dtype=dtype), requires_grad=param.requires_grad)
            submodule.register_parameter(name, fake)
        for name, buffer in list(submodule.named_buffers(recurse=False)):
            submodule.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype), persistent=False)


def _prepare_gradients(module: nn.Module, *, update_bytes: float | None) -> None:
    """Give every trained parameter a gradient.

    With the optimizer in the backward pass, whose update takes `update_bytes` per element, a parameter has none before
    and drops what it gets after the update.
    """
    for param in module.parameters():
        if not param.requires_grad:
            continue
        if update_bytes is None:
            param.grad = torch.empty_like(param)
        else:
            param.register_post_accumulate_grad_hook(partial(_update, update_bytes))  # type: ignore[no-untyped-call]


def _update(update_bytes: float, param: Tensor) -> None:
    torch.empty(int(param.numel() * update_bytes), dtype=torch.uint8)
    param.grad = None


def _context_ratio(cfg: Any) -> float:
    """The highest mask ratio of the context view in many draws."""
    sampler: ViewSampler = cfg.view_sampler.build()
    tokens, maskable = np.zeros(4, dtype=np.int64), np.ones(4, dtype=np.bool_)
    draws = (sampler(tokens, maskable, mask_id=1, seed=0, epoch=0, index=index) for index in range(_DRAWS))
    return max(views.context.mask_ratio for views in draws)
