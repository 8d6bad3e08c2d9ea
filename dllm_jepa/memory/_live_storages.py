"""Bytes of tensors, and of all that are alive at a time."""

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


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
