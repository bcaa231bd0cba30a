"""`etha.tensor_bus.ipc.manifest`: what passes `validate` cannot lead outside an allocation."""

from __future__ import annotations

import random
import subprocess
import sys

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etha.errors import InvalidRecord
from etha.tensor_bus.ipc.allocations import HostAllocation
from etha.tensor_bus.ipc.manifest import (
    ITEMSIZE,
    MAX_DIMENSIONS,
    MAX_ENTRIES,
    MAX_NAME_BYTES,
    Manifest,
    Storage,
    TensorSpec,
    validate,
)

INT64 = 2**63 - 1
FILE = HostAllocation(device=1, inode=2, size=4096)
STORAGE = Storage(allocation=0, offset=64, nbytes=400)
SPEC = TensorSpec(storage=0, dtype="float32", shape=(10, 10), stride=(10, 1), offset=0)


def manifest(allocations=(FILE,), storages=(STORAGE,), tensors=(SPEC,), names=None):
    return Manifest(tuple(allocations), tuple(storages), tuple(tensors), {"w": 0} if names is None else names)


def spec(**changes):
    return manifest(tensors=[msgspec.structs.replace(SPEC, **changes)])


def test_accepts_a_sound_manifest_and_an_empty_one():
    validate(manifest())
    validate(Manifest((), (), (), {}))


def test_survives_the_wire():
    sound = manifest()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sound), type=Manifest) == sound


@pytest.mark.parametrize("name", sorted(ITEMSIZE))
def test_item_sizes_are_torchs(name):
    dtype = getattr(torch, name)
    assert str(dtype) == f"torch.{name}"
    assert dtype.itemsize == ITEMSIZE[name]


def test_every_dense_dtype_of_this_torch_is_known_or_left_out_on_purpose():
    dtypes = {str(each).removeprefix("torch.") for each in vars(torch).values() if isinstance(each, torch.dtype)}
    left_out = dtypes - set(ITEMSIZE)
    assert {name for name in left_out if not name.startswith(("q", "bits", "int", "uint"))} == set()
    assert left_out.isdisjoint({f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)})


REFUSED = {
    "storage index": (spec(storage=1), "w"),
    "negative storage index": (spec(storage=-1), "w"),
    "dtype": (spec(dtype="qint8"), "w"),
    "dtype alias": (spec(dtype="float"), "w"),
    "dtype attribute of torch": (spec(dtype="load"), "w"),
    "ranks": (spec(stride=(1,)), "w"),
    "dimensions": (spec(shape=(1,) * 65, stride=(1,) * 65), "w"),
    "negative size": (spec(shape=(-1, 10)), "w"),
    "negative stride": (spec(stride=(-10, 1)), "w"),
    "negative offset": (spec(offset=-4), "w"),
    "unaligned offset": (spec(shape=(1, 1), offset=2), "w"),
    "one element too far": (spec(shape=(10, 11), stride=(10, 1)), "w"),
    "offset one item too far": (spec(offset=4), "w"),
    "stride beyond int64": (spec(shape=(1, 1), stride=(2**63, 1)), "w"),
    "size beyond int64 hidden by zero": (spec(shape=(0, 2**63), stride=(1, 1)), "w"),
    "offset beyond int64 of nothing": (spec(shape=(0,), stride=(1,), offset=2**63), "w"),
    "product wraps to nothing": (spec(shape=(2**32, 2**32), stride=(0, 0)), "w"),
    "product wraps before a zero": (spec(shape=(2**62, 4, 0), stride=(0, 0, 0)), "w"),
    "extent wraps to the start": (spec(shape=(2**62 + 1,), stride=(4,)), "w"),
    "allocation index": (manifest(storages=[Storage(1, 0, 400)]), "storages[0]"),
    "allocation index below -1": (manifest(storages=[Storage(-2, 0, 400)]), "storages[0]"),
    "no allocation but bytes": (manifest(storages=[Storage(-1, 0, 400)]), "storages[0]"),
    "no allocation but offset": (manifest(storages=[Storage(-1, 1, 0)]), "storages[0]"),
    "allocation but no bytes": (manifest(storages=[Storage(0, 0, 0)]), "storages[0]"),
    "negative bytes": (manifest(storages=[Storage(0, 0, -1)]), "storages[0]"),
    "negative storage offset": (manifest(storages=[Storage(0, -1, 400)]), "storages[0]"),
    "storage one byte too far": (manifest(storages=[Storage(0, 3697, 400)]), "storages[0]"),
    "storage wraps": (manifest(storages=[Storage(0, 2**64 - 200, 400)]), "storages[0]"),
    "empty allocation": (manifest(allocations=[HostAllocation(1, 2, 0)]), "allocations[0]"),
    "negative allocation": (manifest(allocations=[HostAllocation(1, 2, -1)]), "allocations[0]"),
    "allocation beyond int64": (manifest(allocations=[HostAllocation(1, 2, 2**63)]), "allocations[0]"),
    "impossible inode": (manifest(allocations=[HostAllocation(1, 2**64, 4096)]), "allocations[0]"),
    "impossible device": (manifest(allocations=[HostAllocation(-1, 2, 4096)]), "allocations[0]"),
    "allocation twice": (manifest(allocations=[FILE, HostAllocation(1, 2, 9)]), "allocations[1]"),
    "tensor index": (manifest(names={"w": 0, "v": 1}), "v"),
    "negative tensor index": (manifest(names={"w": 0, "v": -1}), "v"),
    "nameless tensor": (manifest(tensors=[SPEC, SPEC]), "tensors[1]"),
    "empty name": (manifest(names={"": 0}), "''"),
    "long name": (manifest(names={"é" * (MAX_NAME_BYTES // 2) + "x": 0}), None),
    "name that is no text": (manifest(names={"\ud800": 0}), None),
    "names": (manifest(names=dict.fromkeys(map(str, range(MAX_ENTRIES + 1)), 0)), "names"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refuses(kind):
    record, resource = REFUSED[kind]
    with pytest.raises(InvalidRecord) as caught:
        validate(record)
    assert isinstance(caught.value.resource, str)
    caught.value.resource.encode("ascii")
    if resource is not None:
        assert caught.value.resource == resource


ACCEPTED = {
    "last byte": manifest(storages=[Storage(0, 3696, 400)]),
    "two names": manifest(names={"w": 0, "tied": 0}),
    "long name": manifest(names={"é" * (MAX_NAME_BYTES // 2): 0}),
    "zero-dimensional": spec(shape=(), stride=(), offset=396),
    "expanded": spec(shape=(2**62,), stride=(0,)),
    "one element, any stride": spec(shape=(1, 1), stride=(INT64, INT64)),
    "most dimensions": spec(shape=(1,) * MAX_DIMENSIONS, stride=(1,) * MAX_DIMENSIONS),
    "nothing, beyond the end": spec(shape=(0,), stride=(1,), offset=4000),
    "nothing of nothing": manifest(
        allocations=[], storages=[Storage(-1, 0, 0)], tensors=[TensorSpec(0, "bool", (0,), (1,), 0)]
    ),
    "zero before what would not fit": spec(shape=(0, 2**62, 4), stride=(1, 1, 1)),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_accepts(kind):
    validate(ACCEPTED[kind])


EDGES = [0, 1, 2, 3, 4, 7, 8, 100, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -1]
NUMBERS = st.one_of(st.integers(-1, 12), st.sampled_from(EDGES), st.integers(-(2**65), 2**65))
SMALL = st.one_of(st.integers(0, 6), NUMBERS)


@st.composite
def cases(draw):
    """One tensor over one storage, most of them near a border of what is allowed."""
    itemsize_of = draw(st.sampled_from(["uint8", "float16", "float32", "complex128"]))
    rank = draw(st.integers(0, 4))
    shape = tuple(draw(SMALL) for _ in range(rank))
    stride = tuple(draw(SMALL) for _ in range(rank))
    item = ITEMSIZE[itemsize_of]
    offset = draw(st.one_of(st.integers(0, 5).map(lambda count: count * item), NUMBERS))
    exact = offset + (sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1) * item
    nbytes = draw(st.one_of(st.sampled_from([exact, exact - 1, exact + 1]), NUMBERS))
    return itemsize_of, shape, stride, offset, nbytes


def oracle(dtype, shape, stride, offset, nbytes):
    """Written from the rules, element by element of what torch and the kernel would compute, with no code in common."""
    item = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    if not 1 <= nbytes <= INT64:
        return False
    if any(not 0 <= number <= INT64 for number in (*shape, *stride, offset)):
        return False
    if offset % item != 0:
        return False
    count = 1
    for size in shape:
        count = count * size
        if count > INT64:
            return False
    if 0 in shape:
        return True
    farthest = offset + sum((size - 1) * step * item for size, step in zip(shape, stride, strict=True))
    return farthest + item <= nbytes


def check_against_oracle(case):
    dtype, shape, stride, offset, nbytes = case
    record = Manifest(
        (HostAllocation(1, 2, INT64),),
        (Storage(0, 0, nbytes),),
        (TensorSpec(0, dtype, shape, stride, offset),),
        {"w": 0},
    )
    try:
        validate(record)
        accepted = True
    except InvalidRecord:
        accepted = False
    assert accepted == oracle(*case)
    return accepted


@settings(max_examples=4000, deadline=None)
@given(cases())
def test_agrees_with_unbounded_arithmetic(case):
    check_against_oracle(case)


@pytest.mark.stress
def test_agrees_with_unbounded_arithmetic_a_million_times():
    # Drawn without hypothesis, which takes an hour for as many.
    seed = random.SystemRandom().getrandbits(64)
    print(f"seed {seed}")
    source = random.Random(seed)
    verdicts = [check_against_oracle(random_case(source)) for _ in range(1_000_000)]
    assert 100_000 < sum(verdicts) < 900_000


def random_case(source):
    """As `cases`, from a random source."""

    def number():
        kind = source.random()
        if kind < 0.8:
            return source.randint(0, 6)
        return source.choice(EDGES) if kind < 0.95 else source.randint(-(2**65), 2**65)

    dtype = source.choice(["uint8", "float16", "float32", "complex128"])
    item = ITEMSIZE[dtype]
    rank = source.randint(0, 4)
    shape = tuple(number() for _ in range(rank))
    stride = tuple(number() for _ in range(rank))
    offset = source.randint(0, 5) * item if source.random() < 0.8 else number()
    exact = offset + (sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1) * item
    nbytes = exact + source.randint(-1, 1) if source.random() < 0.8 else number()
    return dtype, shape, stride, offset, nbytes


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_what_passes_torch_can_view_inside_the_storage(data):
    dtype, shape, stride, offset, _ = data.draw(cases())
    nbytes = 64
    if not check_against_oracle((dtype, shape, stride, offset, nbytes)):
        return
    storage = torch.UntypedStorage(nbytes)
    view = torch.empty(0, dtype=getattr(torch, dtype))
    view.set_(storage, offset // view.element_size(), shape, stride)
    assert storage.nbytes() == nbytes
    assert tuple(view.shape) == shape


def test_imports_no_torch():
    code = "import sys, etha.tensor_bus.ipc.manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
