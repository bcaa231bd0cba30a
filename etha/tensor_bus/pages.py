"""Whether an LMDB file is sound, page by page, without LMDB: it trusts what it finds, and may die of it.

LMDB checks little. A bit that is flipped in a page's own number, in a node's offset or in the list of free pages can
end whoever writes next by an assertion (seen: ``mp->mp_pgno != pgno``), or make it overwrite what is in use. So, before
an agent writes to a file that it did not make, every page that is in use is looked at: it bears its own number, nodes
fill it exactly, keys are in order and within the bounds of the branch above, and no page is used twice, or used and
free. Pages that are neither are no damage: what they cost is room.

Source: mdb.c of LMDB 0.9 (``MDB_page``, ``MDB_node``, ``MDB_meta``, ``MDB_db``), data version 1, on a 64-bit
little-endian machine. A file of any other version is refused by LMDB itself, and passes here.

While processes write to the file, call it within a read transaction: what that sees, and what is committed later, stays
as it is until the transaction ends.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

_META: Final = struct.Struct("<II16x")
_DATABASE: Final = struct.Struct("<IHH5Q")
_ENDS: Final = struct.Struct("<QQ")
_PAGE: Final = struct.Struct("<QHHHH")
_NODE: Final = struct.Struct("<HHHH")
_NUMBER: Final = struct.Struct("<Q")
_MAGIC, _DATA_VERSION = 0xBEEFC0DE, 1
_BRANCH, _LEAF, _OVERFLOW, _IS_META = 1, 2, 4, 8
_BIG_DATA: Final = 1
_INTEGER_KEYS: Final = 8
_NO_DIRECTORY: Final = 0x4000
"""An option of who made the file, which LMDB keeps with it."""
_NONE: Final = (1 << 64) - 1
_HEADER: Final = _PAGE.size
_FIRST: Final = 2
_MOST_DEPTH: Final = 32
"""``CURSOR_STACK`` of mdb.c."""

_ATTEMPTS: Final = 100


class Damage(Exception):
    """The file is not what LMDB writes; the text says where."""


class _Tree(NamedTuple):
    """One database of the file: flags, depth in pages, entries, and the page at its root."""

    pad: int
    flags: int
    depth: int
    branches: int
    leaves: int
    overflows: int
    entries: int
    root: int


class _Meta(NamedTuple):
    free: _Tree
    main: _Tree
    last: int
    transaction: int


class _Node(NamedTuple):
    """One node: of a branch the page below it; of a leaf key and value, or the bytes of a value that lies elsewhere."""

    page: int
    key: bytes
    value: bytes
    long: int


Item = tuple[bytes, bytes]


def check(path: str) -> None:
    """Look at every page that is in use.

    Raises:
        Damage: one of them is not sound.
        OSError: the file cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _File(fd).check()
    finally:
        os.close(fd)


class _File:
    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._size = 4096
        self._last = 0
        self._used: set[int] = set()

    def check(self) -> None:
        meta = self._meta()
        if meta is None:
            return
        self._last = meta.last
        for _ in self._items(meta.main, integers=False):
            pass
        free: list[int] = []
        for _, value in self._items(meta.free, integers=True):
            free += _numbers(value)
        if len(set(free)) < len(free):
            raise Damage("a page is free twice")
        for page in free:
            if not _FIRST <= page <= self._last:
                raise Damage(f"page {page}, which is free, does not exist")
            if page in self._used:
                raise Damage(f"page {page} is in use, and free")

    def _meta(self) -> _Meta | None:
        """The newer of both meta pages; None in a file that was never written to, or is of another version."""
        first = os.pread(self._fd, self._size, 0)
        if len(first) < _HEADER + _META.size + _DATABASE.size:
            if first:
                raise Damage("it is shorter than its first page")
            return None
        magic, version = _META.unpack_from(first, _HEADER)
        if magic != _MAGIC or version & 0xFFFF != _DATA_VERSION:
            return None
        self._size = _DATABASE.unpack_from(first, _HEADER + _META.size)[0]
        if self._size & (self._size - 1) or not 512 <= self._size <= 1 << 16:
            raise Damage(f"pages of {self._size} bytes")
        data = self._both_metas()
        metas = [_one_meta(data, number, self._size) for number in range(_FIRST)]
        older, newer = sorted(metas, key=lambda meta: meta.transaction)
        if newer.transaction - older.transaction > 1 or any(
            meta.transaction and meta.transaction % _FIRST != number for number, meta in enumerate(metas)
        ):
            raise Damage(f"transactions {older.transaction} and {newer.transaction} do not follow on one another")
        return newer

    def _both_metas(self) -> bytes:
        """Both meta pages as they were at one moment; commits may be under way."""
        data = b""
        for _ in range(_ATTEMPTS):
            before, data = data, os.pread(self._fd, _FIRST * self._size, 0)
            if data == before:
                break
        return data

    def _items(self, tree: _Tree, *, integers: bool) -> Iterator[Item]:
        """Every key and value, in order, each page checked on the way."""
        if (tree.root == _NONE) != (tree.depth == 0) or tree.depth > _MOST_DEPTH:
            raise Damage(f"a tree of depth {tree.depth} at page {tree.root}")
        entries = 0
        if tree.depth:
            for item in self._below(tree.root, tree.depth, b"", None, integers):
                entries += 1
                yield item
        if entries != tree.entries:
            raise Damage(f"{entries} entries, and {tree.entries} were expected")

    def _below(self, number: int, depth: int, low: bytes, high: bytes | None, integers: bool) -> Iterator[Item]:
        """What stands in a page and below it; keys are those from ``low`` on, and before ``high``."""
        data = self._page(number, _LEAF if depth == 1 else _BRANCH)
        nodes = self._nodes(data, number, leaf=depth == 1)
        keys = [node.key[::-1] if integers else node.key for node in nodes]
        if depth > 1:
            keys[0] = low  # LMDB looks at no key before the second of a branch
        ends = [*keys, *([] if high is None else [high])]
        if keys[0] < low or any(one >= other for one, other in itertools.pairwise(ends)):
            raise Damage(f"keys of page {number} are out of order")
        for place, node in enumerate(nodes):
            if depth > 1:
                upper = keys[place + 1] if place + 1 < len(keys) else high
                yield from self._below(node.page, depth - 1, keys[place], upper, integers)
            else:
                yield node.key, self._long(node) if node.long else node.value

    def _page(self, number: int, kind: int) -> bytes:
        """A page of this kind that is used nowhere else."""
        if not _FIRST <= number <= self._last or number in self._used:
            raise Damage(f"page {number} is used twice, or does not exist")
        self._used.add(number)
        data = os.pread(self._fd, self._size, number * self._size)
        if len(data) < self._size:
            raise Damage(f"it is cut short in page {number}")
        bears, _, flags, _, _ = _PAGE.unpack_from(data)
        if (bears, flags) != (number, kind):
            raise Damage(f"page {number} bears the number {bears} and the flags {flags}")
        return data

    def _nodes(self, data: bytes, number: int, *, leaf: bool) -> list[_Node]:
        """The nodes of a page, in order. They fill it exactly, from its end downwards."""
        lower, upper = _PAGE.unpack_from(data)[3:]
        count = (lower - _HEADER) // 2
        if not _HEADER < lower <= upper <= self._size or lower % 2:
            raise Damage(f"page {number} has {lower} and {upper} for its ends")
        places = struct.unpack_from(f"<{count}H", data, _HEADER)
        nodes, extents = [], []
        for place in places:
            if not upper <= place <= self._size - _NODE.size:
                raise Damage(f"page {number} has a node at {place}")
            low, high, flags, key_size = _NODE.unpack_from(data, place)
            size, long = low | high << 16, bool(leaf and flags & _BIG_DATA)
            if leaf and flags & ~_BIG_DATA:
                raise Damage(f"page {number} has a node with flags {flags}")
            here = 0 if not leaf else _NUMBER.size if long else size
            start = place + _NODE.size
            middle, end = start + key_size, start + key_size + here
            if end > self._size:
                raise Damage(f"page {number} has a node that ends at {end}")
            value = data[middle:end]
            page = _NUMBER.unpack(value)[0] if long else 0 if leaf else size | flags << 32
            nodes.append(_Node(page, data[start:middle], value, size if long else 0))
            extents.append((place, end + end % 2))
        extents.sort()
        if [upper, *(end for _, end in extents)] != [*(start for start, _ in extents), self._size]:
            raise Damage(f"page {number} is not filled by its nodes")
        return nodes

    def _long(self, node: _Node) -> bytes:
        """A value that has pages of its own."""
        data = self._page(node.page, _OVERFLOW)
        lower, upper = _PAGE.unpack_from(data)[3:]
        count = lower | upper << 16
        if not 0 < count <= self._last - node.page + 1 or count * self._size < _HEADER + node.long:
            raise Damage(f"page {node.page} is said to be {count} pages of {node.long} bytes")
        rest = range(node.page + 1, node.page + count)
        if not self._used.isdisjoint(rest):
            raise Damage(f"page {node.page} and those behind it are used twice")
        self._used.update(rest)
        value = os.pread(self._fd, node.long, node.page * self._size + _HEADER)
        if len(value) < node.long:
            raise Damage(f"it is cut short in page {node.page}")
        return value


def _one_meta(both: bytes, number: int, size: int) -> _Meta:
    data = both[number * size : (number + 1) * size]
    if len(data) < size:
        raise Damage(f"it is cut short in page {number}")
    bears, _, flags, _, _ = _PAGE.unpack_from(data)
    magic, version = _META.unpack_from(data, _HEADER)
    if (bears, flags, magic, version & 0xFFFF) != (number, _IS_META, _MAGIC, _DATA_VERSION):
        raise Damage(f"page {number} is no meta page")
    place = _HEADER + _META.size
    free, main = [_Tree(*_DATABASE.unpack_from(data, place + each * _DATABASE.size)) for each in range(2)]
    last, transaction = _ENDS.unpack_from(data, place + 2 * _DATABASE.size)
    if (free.pad, free.flags & ~_NO_DIRECTORY, main.pad, main.flags) != (size, _INTEGER_KEYS, 0, 0):
        raise Damage(f"page {number} has flags that no file of etha's has")
    return _Meta(free, main, last, transaction)


def _numbers(value: bytes) -> tuple[int, ...]:
    """The pages in an entry of the list of free ones: how many, and which; LMDB may have left room behind them."""
    count = _NUMBER.unpack_from(value)[0] if len(value) >= _NUMBER.size else -1
    if not 0 <= count < len(value) // _NUMBER.size:
        raise Damage(f"{count} free pages in {len(value)} bytes")
    return struct.unpack_from(f"<{count}Q", value, _NUMBER.size)
