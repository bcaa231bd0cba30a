"""Copy named tensors into named places. All is checked before the first byte is copied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from etha.errors import InvalidArgument

if TYPE_CHECKING:
    import torch


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
    for name in chosen:
        if sources[name].shape != places[name].shape:
            raise InvalidArgument(
                f'"{name}" has shape {tuple(sources[name].shape)}, its target {tuple(places[name].shape)}.',
                resource=name,
                remedy="Give a view of the target that has the source's shape.",
            )
    with torch.no_grad():
        for name in chosen:
            places[name].copy_(sources[name])


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
    for name, tensor in targets.items():
        if not isinstance(tensor, torch.Tensor):
            raise InvalidArgument(f'target "{name}" is a {type(tensor).__name__}, no tensor.', resource=str(name))
    return dict(targets)


def _chosen(
    sources: Mapping[str, torch.Tensor],
    places: Mapping[str, torch.Tensor],
    names: Iterable[str] | None,
    strict: bool,
) -> list[str]:
    wanted = list(sources) if names is None else list(names)
    unknown = [name for name in wanted if name not in sources]
    if unknown:
        raise InvalidArgument(
            f'"{unknown[0]}" is not published.', resource=unknown[0], remedy="See etha status for the names there are."
        )
    missing = [name for name in wanted if name not in places]
    unexpected = [name for name in places if name not in wanted] if names is None else []
    if strict and (missing or unexpected):
        name = (missing or unexpected)[0]
        side = "has no target" if missing else "is not published"
        raise InvalidArgument(
            f'"{name}" {side} ({len(missing)} without a target, {len(unexpected)} without a source).',
            resource=name,
            remedy="Match the names, or say strict=False.",
        )
    return [name for name in wanted if name in places]
