"""Which tensors can be shared at all, whatever memory they lie in.

What is refused here has no bytes that mean the same to another process: no storage (meta, fake, wrappers), bytes that
are not the values (quantized, conjugated, sparse), or a layout that a spec does not describe. Each refusal says
what to do instead; nothing is converted behind the user's back.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from etha.errors import NotShareable
from etha.tensor_bus.ipc.manifest import ITEMSIZE

if TYPE_CHECKING:
    import torch


class Refusal(NamedTuple):
    """Why a tensor cannot be shared (``"is sparse"``), and the sentence that says what to do."""

    reason: str
    remedy: str

    def error(self, name: str) -> NotShareable:
        """The error to raise for the tensor ``name``."""
        return NotShareable(f"tensor {name!r} {self.reason}.", resource=name, remedy=self.remedy)


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """Torch's canonical name of a dtype, without the prefix: ``"float32"`` also for ``torch.float``."""
    return str(dtype).removeprefix("torch.")


def refusal(value: object, device_type: str) -> Refusal | None:
    """Say why ``value`` cannot be shared by a backend for ``device_type``, or None if nothing forbids it.

    Subclasses are judged by what they override: one with its own ``__torch_dispatch__`` (a DTensor, a quantized
    weight of torchao) may hold no bytes of its own, one without is a plain tensor with a name, as
    `torch.nn.Parameter` is. Call it with torch functions disabled (``torch._C.DisableTorchFunction``): a
    subclass may answer for its attributes in ``__torch_function__``.

    Args:
        value: what the user gave under a name.
        device_type: the one device type that the backend serves (``"cpu"``).
    """
    import torch

    if not isinstance(value, torch.Tensor):
        kind = type(value)
        return Refusal(
            f"is a {kind.__module__}.{kind.__qualname__}, not a torch.Tensor",
            "Give torch tensors only (torch.from_numpy(array).share_memory_() copies an array).",
        )
    return _no_storage(value) or _not_dense(value) or _not_here(value, device_type)


def _no_storage(tensor: torch.Tensor) -> Refusal | None:
    import torch

    fake = sys.modules.get("torch._subclasses.fake_tensor")
    if fake is not None and isinstance(tensor, fake.FakeTensor):
        return Refusal("is a FakeTensor, which has no memory", "Register outside of FakeTensorMode.")
    if torch.nn.parameter.is_lazy(tensor):
        return Refusal("is not initialised yet", "Run the module once, so that its lazy parameters get a shape.")
    if tensor.is_nested:
        return Refusal("is nested", "Register its values and offsets as tensors of their own.")
    kind = type(tensor)
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return Refusal(
            f"is a {kind.__module__}.{kind.__qualname__}, which dispatches for itself",
            "Register the plain tensors inside it (for a DTensor: to_local()).",
        )
    if tensor.layout is not torch.strided:
        return Refusal(
            f"has the layout {tensor.layout}",
            "Register to_dense(), or its values and indices as tensors of their own.",
        )
    if tensor.is_meta:
        return Refusal("is on the meta device, which has no memory", "Materialise it first (to_empty()).")
    return None


def _not_dense(tensor: torch.Tensor) -> Refusal | None:
    if tensor.is_quantized:
        return Refusal("is quantized", "Register int_repr(), with scale and zero point beside it.")
    if dtype_name(tensor.dtype) not in ITEMSIZE:
        return Refusal(f"has the dtype {tensor.dtype}", "Register a view of a byte-sized dtype (uint8).")
    if tensor.is_conj():
        return Refusal("is a conjugate that was not computed yet", "Register resolve_conj().")
    if tensor.is_neg():
        return Refusal("is a negation that was not computed yet", "Register resolve_neg().")
    if tensor._is_zerotensor():
        return Refusal("is a zero tensor without memory", "Register clone().share_memory_().")
    return None


def _not_here(tensor: torch.Tensor, device_type: str) -> Refusal | None:
    import torch

    found = tensor.device.type
    if found != device_type:
        return Refusal(
            f"is on {tensor.device}, and this agent's device is {device_type}",
            f"Register it with the agent of {found} devices, or move it first.",
        )
    try:
        tensor.untyped_storage()
    except RuntimeError as error:
        return Refusal(
            f"has no storage that can be reached ({str(error).splitlines()[0]})",
            "Register outside of torch.func transforms.",
        )
    # Asking a copy-on-write storage for its address makes the copy: it must be refused before.
    if torch._C._is_cow_tensor(tensor):  # type: ignore[attr-defined]
        return Refusal("shares its bytes until one side writes", "Register clone().share_memory_().")
    return None
