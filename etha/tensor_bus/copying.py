"""Copy named tensors into named places. All is checked before the first byte is copied.

A call of `copy_` costs more than a small tensor's bytes do, so tensors are handed to torch in lists
(`torch._foreach_copy_`). On the host a list is the same loop, in C++. On a device one kernel copies hundreds of small
tensors. It does not look at all that `copy_` looks at, so a list has only pairs with which both do the same there
(`_goes_in_a_list`), and none if their order matters. What is large is copied one by one, by the device's own copy.

Copies from device to device are queued on the caller's current stream, and no host waits for them: the lease's end
comes behind them there. Wherever host memory takes part `copy_` returns when it has copied: a lease on host memory
ends with its holder's call, and a caller reads what it copied to the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from etha.errors import InvalidArgument

if TYPE_CHECKING:
    import torch

    Pair = tuple[torch.Tensor, torch.Tensor]
    """A source and its target."""

_IS_CPU: Final = attrgetter("is_cpu")

_HOST_LIST: Final = 64
"""Tensors in a list of the host's: torch sees no Ctrl-C before the end of a list. Longer ones are hardly faster."""

_DEVICE_SMALL_BYTES: Final = 1 << 20
"""A larger target keeps a device about as long as its launch keeps the host. By arithmetic; not measured."""

_WORDS: Final = {1: "uint8", 2: "int16", 4: "int32", 8: "int64", 16: "complex128"}
"""Item size to the dtype as which a list of a device is copied. The kernel of torch 2.6 knows these, and no 8-bit
floats; and it copies 16-bit floats through 32 bits, in which a NaN loses its payload."""

_CASTS: Final = frozenset({"float16", "bfloat16", "float32", "float64"})
"""Dtypes between which the kernel casts as `copy_` does: both ``static_cast`` (aten/src/ATen/native/cuda/
ForeachBinaryOpList.cu, ``CopyFunctor``)."""


def copy_tensors(
    sources: Mapping[str, torch.Tensor],
    targets: torch.nn.Module | Mapping[str, torch.Tensor],
    *,
    names: Iterable[str] | None,
    strict: bool,
) -> None:
    """Copy ``sources`` into ``targets`` by name; the arguments are those of `Lease.copy_into`.

    Raises:
        InvalidArgument: nothing has been copied then.
    """
    import torch

    places = _places(targets)
    chosen = _chosen(sources, places, names, strict)
    there, here = list(map(sources.__getitem__, chosen)), list(map(places.__getitem__, chosen))
    plain = all(map(_is_plain, set(map(type, here))))
    if not (plain and _are_dense_and_fit(there, here)):
        for name, source, target in zip(chosen, there, here, strict=True):
            _require_fitting(name, source, target)
    with torch.no_grad():
        if not plain:
            _copy_one_by_one(there, here)
        elif all(map(_IS_CPU, here)) and all(map(_IS_CPU, there)):
            _copy_on_host(there, here)
        else:
            _copy_on_device(there, here)


def _are_dense_and_fit(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> bool:
    """Whether nothing is to be found in any of them: the usual case, without a line of Python for each."""
    import torch

    try:
        return all(map(torch.Tensor.is_same_size, targets, sources)) and all(map(torch.Tensor.is_contiguous, targets))
    except RuntimeError:  # a layout that has no strides
        return False


def _require_fitting(name: str, source: torch.Tensor, target: torch.Tensor) -> None:
    """Refuse a target of another shape, or that is no memory of its own, element by element.

    Raises:
        InvalidArgument: so it is.
    """
    import torch

    if source.shape != target.shape:
        raise InvalidArgument(
            f'"{name}" has shape {tuple(source.shape)}, its target {tuple(target.shape)}.',
            resource=name,
            remedy="Give a view of the target that has the source's shape.",
        )
    if not _is_plain(type(target)):
        return  # its class knows what it can be written with
    if target.layout is not torch.strided:
        reason = f"has the layout {target.layout}"
    elif any(step == 0 and size > 1 for step, size in zip(target.stride(), target.shape, strict=True)):
        reason = "is expanded: several of its elements are the same memory"
    else:
        return
    raise InvalidArgument(f'the target of "{name}" {reason}.', resource=name, remedy="Give a dense tensor.")


def _is_plain(kind: type[torch.Tensor]) -> bool:
    """Whether torch itself copies into such a tensor, and no subclass of a user's."""
    import torch

    return kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def _copy_one_by_one(sources: Iterable[torch.Tensor], targets: Iterable[torch.Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source, non_blocking=source.device.type != "cpu" and target.device.type != "cpu")


def _copy_on_host(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
    import torch

    for first in range(0, len(targets), _HOST_LIST):
        torch._foreach_copy_(targets[first : first + _HOST_LIST], sources[first : first + _HOST_LIST])


# -- device memory --------------------------------------------------------------------------------


def _copy_on_device(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    """Copy each; some of them at least are on a device."""
    import torch

    # Tied tensors have several names.
    once = {(id(source), id(target)): (source, target) for source, target in zip(sources, targets, strict=True)}
    pairs = list(once.values())
    if _order_matters(pairs):
        _copy_one_by_one(sources, targets)
        return
    # By dtypes too: of a list with several kinds of targets torch took the first one's for all (pytorch #173383).
    lists: dict[tuple[torch.device, torch.dtype, torch.dtype], list[Pair]] = {}
    for source, target in pairs:
        if _goes_in_a_list(source, target):
            words = _as_words(source, target)
            lists.setdefault((target.device, words[0].dtype, words[1].dtype), []).append(words)
        else:
            _copy_one_by_one((source,), (target,))
    for several in lists.values():
        torch._foreach_copy_([target for _, target in several], [source for source, _ in several], non_blocking=True)


def _goes_in_a_list(source: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether the device's kernel for lists does the same with these as `copy_`, and is of use."""
    if source.device != target.device or not 0 < target.nbytes <= _DEVICE_SMALL_BYTES:
        return False
    if not source.is_contiguous() or not target.is_contiguous():
        return False  # for one such pair torch copies the whole list one by one
    if target.is_conj() or target.is_neg():
        return False
    if source.dtype == target.dtype:
        return source.itemsize in _WORDS
    return {str(dtype).removeprefix("torch.") for dtype in (source.dtype, target.dtype)} <= _CASTS


def _as_words(source: torch.Tensor, target: torch.Tensor) -> Pair:
    """The same bytes as integers, unless they are to be cast."""
    import torch

    if source.dtype != target.dtype:
        return source, target
    word: torch.dtype = getattr(torch, _WORDS[source.itemsize])
    return source.view(word), target.view(word)


def _order_matters(pairs: Sequence[Pair]) -> bool:
    """Whether a target lies where another target, or any source, does. Of spans, so a false yes is possible."""
    spans = sorted([(*_span(target), True) for _, target in pairs] + [(*_span(source), False) for source, _ in pairs])
    written = read = 0
    for start, end, is_target in spans:
        if start == end:
            continue
        if start < written or (is_target and start < read):
            return True
        if is_target:
            written = max(written, end)
        else:
            read = max(read, end)
    return False


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses from its first byte to behind its last one. Those of host and devices are all different."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.itemsize


# -- names ----------------------------------------------------------------------------------------


def _places(targets: torch.nn.Module | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    import torch

    if isinstance(targets, torch.nn.Module):
        return {
            **dict(targets.named_parameters(remove_duplicate=False)),
            **dict(targets.named_buffers(remove_duplicate=False)),
        }
    if not isinstance(targets, Mapping):
        raise InvalidArgument(
            f"targets is a {type(targets).__name__}, neither a module nor a mapping.", resource="targets"
        )
    places = dict(targets)
    if not all(issubclass(kind, torch.Tensor) for kind in set(map(type, places.values()))):
        name, other = next(item for item in places.items() if not isinstance(item[1], torch.Tensor))
        raise InvalidArgument(f'target "{name}" is a {type(other).__name__}, no tensor.', resource=str(name))
    return places


def _chosen(
    sources: Mapping[str, torch.Tensor],
    places: Mapping[str, torch.Tensor],
    names: Iterable[str] | None,
    strict: bool,
) -> list[str]:
    if names is None and sources.keys() == places.keys():
        return list(sources)
    wanted = list(sources) if names is None else list(names)
    unknown = [name for name in wanted if name not in sources]
    if unknown:
        raise InvalidArgument(
            f'"{unknown[0]}" is not published.', resource=unknown[0], remedy="See etha status for the names there are."
        )
    missing = [name for name in wanted if name not in places]
    unexpected = [name for name in places if name not in sources] if names is None else []
    if strict and (missing or unexpected):
        name = (missing or unexpected)[0]
        side = "has no target" if missing else "is not published"
        raise InvalidArgument(
            f'"{name}" {side} ({len(missing)} without a target, {len(unexpected)} without a source).',
            resource=name,
            remedy="Match the names, or say strict=False.",
        )
    return [name for name in wanted if name in places]
