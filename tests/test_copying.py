"""`copying`: what is handed to torch in lists must come out as `copy_` would have left it, one by one."""

from __future__ import annotations

import os
import random

import pytest
import torch

from etha.errors import InvalidArgument
from etha.tensor_bus import copying
from etha.tensor_bus.copying import copy_tensors

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.int8,
    torch.int64,
    torch.uint16,
    torch.bool,
    torch.complex64,
    torch.complex128,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def copy(sources: dict[str, torch.Tensor], targets: dict[str, torch.Tensor], **options) -> None:
    copy_tensors(sources, targets, **{"names": None, "strict": True, **options})


def in_lists(sources: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> None:
    """What a device does; the host's tensors, too, go through its choices."""
    copying._copy_on_device(list(sources.values()), list(targets.values()))


def one_by_one(sources: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(sources[name])


def bits(tensor: torch.Tensor) -> list[int]:
    """Every byte of its elements, in their order."""
    dense = tensor.clone(memory_format=torch.contiguous_format)
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(dense.untyped_storage()).tolist()


def random_bytes(chance: random.Random, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> torch.Tensor:
    """Any bits at all, so floats of every kind; of bools only those that there are."""
    count = torch.Size(shape).numel()
    if dtype is torch.bool:
        return torch.tensor([chance.random() < 0.5 for _ in range(count)], dtype=dtype, device=device).view(shape)
    raw = torch.tensor(list(chance.randbytes(count * dtype.itemsize)), dtype=torch.uint8, device=device)
    return raw.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype, device=device)


def geometry(chance: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """A place for the like of it: dense, transposed, with gaps, or a part of something larger."""
    shape = tuple(tensor.shape)
    kind = chance.choice(("dense", "transposed", "gaps", "part"))
    make = {"dtype": tensor.dtype, "device": tensor.device}
    if kind == "transposed" and len(shape) == 2:
        return torch.zeros(shape[::-1], **make).t()
    if kind == "gaps" and shape:
        return torch.zeros((*shape, 3), **make)[..., 1]
    if kind == "part" and shape:
        return torch.zeros((shape[0] + 2, *shape[1:]), **make)[1 : 1 + shape[0]]
    return torch.zeros(shape, **make)


# -- lists ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", [copy, in_lists])
def test_lists_leave_every_bit_as_copy_does(way, device: str):
    seed = int(os.environ.get("ETHA_SEED", random.randrange(2**32)))
    print(f"ETHA_SEED={seed}")
    chance = random.Random(seed)
    shapes = ((), (0,), (1,), (5,), (3, 4), (2, 0, 3), (2, 3, 4))
    sources = {
        f"{number}": geometry(chance, random_bytes(chance, dtype, chance.choice(shapes), device))
        for number, dtype in enumerate(DTYPES * 12)
    }
    for source in sources.values():
        source.copy_(random_bytes(chance, source.dtype, tuple(source.shape), device))
    places = {name: geometry(chance, source) for name, source in sources.items()}
    expected = {name: place.clone(memory_format=torch.preserve_format) for name, place in places.items()}
    one_by_one(sources, expected)
    way(sources, places)
    for name, place in places.items():
        assert bits(place) == bits(expected[name]), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", [copy, in_lists])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float64, torch.int32])
def test_lists_cast_as_copy_does(way, wanted: torch.dtype, device: str):
    values = [0.0, -0.0, 1.5, 2.5, 3.0000001, -7.25, 100.1]
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2, torch.int16)
    sources = {
        f"{kind} {number}": torch.tensor(values, device=device).to(kind) for kind in kinds for number in range(3)
    }
    places = {name: torch.zeros(len(values), dtype=wanted, device=device) for name in sources}
    expected = {name: place.clone() for name, place in places.items()}
    one_by_one(sources, expected)
    way(sources, places)
    for name, place in places.items():
        assert bits(place) == bits(expected[name]), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", [copy, in_lists])
def test_of_targets_that_overlap_the_last_one_wins(way, device: str):
    memory = torch.zeros(12, device=device)
    sources = {
        "a": torch.full((8,), 1.0, device=device),
        "b": torch.full((8, 2), 2.0, device=device)[:, 0],  # goes in no list: it would come before all others
        "c": torch.full((2,), 3.0, device=device),
    }
    way(sources, {"a": memory[:8], "b": memory[4:], "c": memory[2:4]})
    assert memory.tolist() == [1.0] * 2 + [3.0] * 2 + [2.0] * 8


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", [copy, in_lists])
def test_a_source_that_is_written_on_the_way_is_read_in_order(way, device: str):
    first, second = (torch.full((4,), value, device=device) for value in (1.0, 2.0))
    third = torch.zeros((4, 2), device=device)[:, 0]  # goes in no list
    way({"a": first, "b": second}, {"a": second, "b": third})
    assert (second.tolist(), third.tolist()) == ([1.0] * 4, [1.0] * 4)


def test_what_is_a_list_on_a_device():
    def goes(source: torch.Tensor, target: torch.Tensor) -> bool:
        return copying._goes_in_a_list(source, target)

    row = torch.zeros(4, 4)
    assert goes(row, torch.zeros(4, 4))
    assert goes(row, torch.zeros(4, 4, dtype=torch.bfloat16))
    assert goes(row.to(torch.float8_e4m3fn), torch.zeros(4, 4, dtype=torch.float8_e4m3fn))
    assert not goes(row, torch.zeros(4, 4).t())
    assert not goes(row, torch.zeros(4, 4, dtype=torch.int32))
    assert not goes(row, torch.zeros(4, 4, dtype=torch.float8_e4m3fn))
    assert not goes(row, torch.zeros(4, 4, device="meta"))
    assert not goes(torch.zeros(0), torch.zeros(0))
    large = torch.zeros(copying._DEVICE_SMALL_BYTES // 4 + 1)
    assert not goes(large, large.clone())
    complex_row = torch.zeros(4, dtype=torch.complex64)
    assert goes(complex_row, complex_row.clone())
    assert not goes(complex_row, complex_row.clone().conj())


def test_tied_tensors_do_not_keep_the_others_out_of_lists(monkeypatch: pytest.MonkeyPatch):
    lengths: list[int] = []
    listed = torch._foreach_copy_
    monkeypatch.setattr(
        torch, "_foreach_copy_", lambda targets, sources, **k: (lengths.append(len(targets)), listed(targets, sources))
    )
    tied, place = torch.ones(4), torch.zeros(4)
    in_lists({"a": tied, "b": torch.ones(4), "c": tied}, {"a": place, "b": torch.zeros(4), "c": place})
    assert lengths == [2]
    assert place.tolist() == [1.0] * 4


def test_more_than_one_list_on_the_host():
    count = 3 * copying._HOST_LIST + 1
    sources = {str(number): torch.full((2,), float(number)) for number in range(count)}
    places = {name: torch.zeros(2) for name in sources}
    copy(sources, places)
    assert [place[0].item() for place in places.values()] == list(range(count))


# -- targets --------------------------------------------------------------------------------------


def test_parameters_keep_their_gradients_and_count_the_write():
    layer = torch.nn.Linear(2, 2)
    version = layer.weight._version
    copy({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, layer)
    assert layer.weight.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert layer.weight.requires_grad
    assert layer.weight.is_leaf
    assert layer.weight._version > version


def test_targets_that_dispatch_for_themselves_are_asked_one_by_one():
    seen: list[str] = []

    class Own(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            seen.append(function.overloadpacket.__name__)
            return args[0]

    target = torch.Tensor._make_wrapper_subclass(Own, (3,))
    place = torch.zeros(2)
    copy({"a": torch.ones(3), "b": torch.ones(2)}, {"a": target, "b": place})
    assert "copy_" in seen
    assert "_foreach_copy_" not in seen
    assert place.tolist() == [1.0, 1.0]


def test_a_module_that_is_partly_on_the_meta_device_is_filled_where_it_has_memory():
    place = torch.zeros(3)
    copy({"a": torch.ones(3), "b": torch.ones(3)}, {"a": torch.zeros(3, device="meta"), "b": place})
    assert place.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ({"a": torch.zeros(2), "b": torch.zeros(2, 1)}, "b"),
        ({"a": torch.zeros(2), "b": torch.zeros(1).expand(2)}, "b"),
        ({"a": torch.zeros(2), "b": torch.zeros(2).to_sparse()}, "b"),
        ({"a": torch.zeros(2), "b": [0.0, 0.0]}, "b"),
        ({"a": torch.zeros(2)}, "b"),
        ({"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2)}, "c"),
        (torch.zeros(2), "targets"),
    ],
    ids=["shape", "expanded", "sparse", "no tensor", "missing", "unexpected", "no mapping"],
)
def test_what_does_not_fit_is_named_before_anything_is_copied(target, name: str):
    with pytest.raises(InvalidArgument) as caught:
        copy({"a": torch.ones(2), "b": torch.ones(2)}, target)
    assert caught.value.resource == name
    if isinstance(target, dict):
        assert target["a"].tolist() == [0.0, 0.0]


def test_both_sides_need_not_have_the_same_names():
    place, other = torch.zeros(2), torch.zeros(2)
    copy({"a": torch.ones(2), "b": torch.ones(2)}, {"a": place, "c": other}, strict=False)
    assert (place.tolist(), other.tolist()) == ([1.0, 1.0], [0.0, 0.0])
    copy({"a": torch.full((2,), 2.0), "b": torch.ones(2)}, {"a": place, "c": other}, names=["a"])
    assert place.tolist() == [2.0, 2.0]
    copy({}, {})
