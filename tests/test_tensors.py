"""Every kind of tensor, through the bus: it arrives equal, or is refused by name and leaves nothing."""

from __future__ import annotations

import pytest
from harness import Raised, Worker

KINDS = """
def shared(t):
    return t.share_memory_()

numbers = [torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32,
           torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64,
           torch.complex128, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz]
torch.manual_seed(0)
tensors = {}
for dtype in numbers:
    raw = torch.randint(0, 2, (48,), dtype=torch.uint8)
    tensors[str(dtype)] = shared(raw.view(dtype) if dtype is not torch.bool else raw.bool())
base = shared(torch.arange(24.0))
tensors["zero-size"] = shared(torch.empty(0, 5))
tensors["zero-dimensional"] = shared(torch.tensor(3.5))
tensors["strided"] = base[1::3]
tensors["transposed"] = base.view(4, 6).t()
tensors["channels-last"] = shared(torch.arange(120.0).view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
tensors["expanded"] = base[:4].view(4, 1).expand(4, 7)
tensors["overlapping"] = base.as_strided((5, 4), (2, 1), 3)
tensors["head"] = base[:12]
tensors["tail"] = base[8:]
tensors["parameter"] = torch.nn.Parameter(shared(torch.ones(3)))
tensors["tied"] = tensors["head"]
"""

PORTRAIT = """
def portrait(t):
    t = t.detach()
    raw = t.contiguous().reshape(-1)
    data = b"" if raw.numel() == 0 else bytes(raw.view(torch.uint8).tolist())
    return str(t.dtype), tuple(t.shape), t.stride(), t.storage_offset(), t.untyped_storage().nbytes(), data
"""


def test_every_accepted_kind_arrives_equal(owner: Worker, reader: Worker):
    owner.do(KINDS + PORTRAIT + "zoo = client.register_tensors('zoo', tensors)")
    reader.do(PORTRAIT + "zoo = client.subscribe('zoo'); lease = zoo.read()")
    sent = owner.do("{name: portrait(t) for name, t in tensors.items()}")
    assert len(sent) == 31
    assert reader.do("{name: portrait(t) for name, t in lease.items()}") == sent
    assert reader.do("list(lease)") == list(sent)
    assert reader.do("lease['tied'] is lease['head'], lease['tail'] is lease['head']") == (True, False)
    assert reader.do("lease['head'].untyped_storage().data_ptr() == lease['overlapping'].untyped_storage().data_ptr()")
    assert reader.do("any(t.requires_grad for t in lease.values())") is False
    owner.do("base[8] = -1")
    assert reader.do("(lease['head'][8].item(), lease['tail'][0].item(), lease['transposed'][2, 1].item())") == (
        -1,
        -1,
        -1,
    )


@pytest.mark.parametrize("strategy", ["file_descriptor", "file_system"])
def test_both_ways_of_torch_to_share(owner: Worker, reader: Worker, strategy: str):
    owner.do(f"""
torch.multiprocessing.set_sharing_strategy({strategy!r})
one, two = torch.arange(5.0).share_memory_(), torch.arange(7).share_memory_()
pair = client.register_tensors("pair", {{"one": one, "two": two}})
""")
    reader.do("pair = client.subscribe('pair'); lease = pair.read()")
    assert reader.do("(lease['one'].tolist(), lease['two'].tolist())") == ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6])
    owner.do("one[0] = 9")
    assert reader.do("lease['one'][0].item()") == 9


REFUSED = {
    "no tensor": "[1.0]",
    "meta": "torch.empty(3, device='meta')",
    "sparse": "torch.eye(3).to_sparse()",
    "sparse csr": "torch.eye(3).to_sparse_csr()",
    "quantized": "torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)",
    "nested": "torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])",
    "fake": "FakeTensorMode().from_tensor(torch.ones(3))",
    "wrapper subclass": "TwoTensor(torch.ones(3), torch.ones(3))",
    "lazily conjugated": "torch.ones(3, dtype=torch.complex64).share_memory_().conj()",
    "lazily negated": "torch.ones(3, dtype=torch.complex64).share_memory_().conj().imag",
    "outside shared memory": "torch.ones(3)",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_shared_is_refused_by_name(owner: Worker, kind: str):
    owner.do("""
import warnings
warnings.simplefilter("ignore")
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
good = torch.ones(3).share_memory_()
before = len(os.listdir("/proc/self/fd"))
""")
    with pytest.raises(Raised, match=r"^NotShareable:") as caught:
        owner.do(f"client.register_tensors('zoo', {{'good': good, 'bad one': {REFUSED[kind]}}})")
    assert caught.value.resource == "bad one"
    assert owner.do("gc.collect(); len(os.listdir('/proc/self/fd')) - before") <= 0
    owner.do("client.register_tensors('zoo', {'good': good})")


def test_each_refusal_has_its_own_reason(owner: Worker):
    owner.do("""
import warnings
warnings.simplefilter("ignore")
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
""")
    reasons = {}
    for kind, expression in REFUSED.items():
        owner.do(f"""
try:
    client.register_tensors('zoo', {{'x': {expression}}})
except etha.errors.NotShareable as error:
    caught = error
""")
        reason, remedy = owner.do("(caught.message, caught.remedy)")
        assert remedy, kind
        reasons[kind] = reason
    assert len(set(reasons.values()) - {reasons["sparse csr"]}) >= len(REFUSED) - 2
