"""`etha.tensor_bus.ipc.driver`: what is loaded when, and what a failed call becomes. The calls need a GPU."""

from __future__ import annotations

import ctypes
import inspect
import types

import pytest
from fake_driver import FakeDriver
from ipc_helpers import in_fork, python

from etha.errors import DriverError, SystemLimit
from etha.tensor_bus.ipc import driver as api
from etha.tensor_bus.ipc.driver import CudaBindings, Driver, failure


def methods(kind: type) -> dict[str, inspect.Signature]:
    return {
        name: inspect.signature(member)
        for name, member in vars(kind).items()
        if not name.startswith("_") and inspect.isfunction(member)
    }


def test_bindings_and_fake_have_every_call_as_the_protocol_says():
    wanted = methods(Driver)
    assert len(wanted) > 20
    for kind in (CudaBindings, FakeDriver):
        found = methods(kind)
        assert {name: found.get(name) for name in wanted} == wanted


def test_nothing_of_cuda_is_loaded_before_it_is_needed():
    done = python(
        "import sys\n"
        "import etha.tensor_bus.ipc.cuda_backend, etha.tensor_bus.ipc.fence\n"
        "sys.exit(any(name == 'torch' or name.startswith(('cuda.', 'cupy')) for name in sys.modules))"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_without_a_driver_it_says_what_is_missing(monkeypatch):
    def none(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", none)
    with pytest.raises(DriverError) as caught:
        api.load.__wrapped__()
    assert caught.value.resource == "libcuda.so.1"
    assert caught.value.remedy


def test_a_failure_names_its_call_and_code():
    error = failure("cuMemMap", 1, "CUDA_ERROR_INVALID_VALUE")
    assert isinstance(error, DriverError)
    assert (error.resource, error.code) == ("cuMemMap", 1)
    full = failure("cuMemMap", api.OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY")
    assert isinstance(full, SystemLimit)
    assert full.resource == "device memory"


class Bindings(types.SimpleNamespace):
    """As much of ``cuda.bindings.driver`` as these tests ask."""

    CUresult = staticmethod(int)

    @staticmethod
    def cuGetErrorName(code):
        return 0, b"CUDA_ERROR_SO"


def bindings(**calls) -> CudaBindings:
    library = types.SimpleNamespace(cuPointerGetAttribute=calls.pop("attribute", lambda *_: 0))
    calls.setdefault("cuDeviceGetUuid", lambda ordinal: (0, types.SimpleNamespace(bytes=b"plain")))
    return CudaBindings(Bindings(**calls), library)


def test_results_come_without_their_status():
    assert bindings(cuDeviceGetCount=lambda: (0, 3)).device_count() == 3
    assert bindings(cuMemGetAddressRange=lambda at: (0, at - 5, 10)).address_range(105) == (100, 10)
    assert bindings(cuCtxSynchronize=lambda: (0,)).synchronize() is None


def test_a_status_becomes_an_error():
    with pytest.raises(DriverError) as caught:
        bindings(cuCtxSynchronize=lambda: (719,)).synchronize()
    assert (caught.value.resource, caught.value.code) == ("cuCtxSynchronize", 719)
    with pytest.raises(SystemLimit):
        bindings(cuMemAddressReserve=lambda *_: (api.OUT_OF_MEMORY, 0)).reserve(1)


def test_a_mig_instances_own_uuid_is_asked_where_both_are_there():
    both = bindings(cuDeviceGetUuid_v2=lambda ordinal: (0, types.SimpleNamespace(bytes=b"its own")))
    assert (both.device_uuid(0), bindings().device_uuid(0)) == (b"its own", b"plain")


def test_an_attribute_is_a_number_however_wide_it_is():
    def attribute(address, number, pointer):
        ctypes.c_uint8.from_address(address).value = number
        return 0

    assert bindings(attribute=attribute).pointer_attribute(api.MEMORY_BLOCK_ID, 4096) == api.MEMORY_BLOCK_ID
    with pytest.raises(DriverError) as caught:
        bindings(attribute=lambda *_: 1).pointer_attribute(2, 0)
    assert caught.value.code == api.INVALID_VALUE


@pytest.mark.parametrize(
    ("status", "state", "capturing"),
    [(0, 0, False), (0, 1, True), (0, 2, True), (api.STREAM_CAPTURE_IMPLICIT, 0, True)],
)
def test_a_stream_that_may_not_be_touched_is_capturing(status, state, capturing):
    assert bindings(cuStreamIsCapturing=lambda stream: (status, state)).is_capturing(0) is capturing


def test_a_forked_child_is_told_that_it_cannot():
    calls = []
    driver = bindings(cuInit=lambda flags: (calls.append(flags) or 0,))
    driver.init()
    driver.init()
    assert calls == [0]

    def body():
        with pytest.raises(DriverError) as caught:
            driver.init()
        return caught.value.resource

    assert in_fork(body) == repr("cuInit")
