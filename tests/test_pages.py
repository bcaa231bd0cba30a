"""`etha.tensor_bus.pages`: what LMDB wrote passes; what is damaged where LMDB would trust it does not."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import lmdb
import pytest

from etha.tensor_bus import pages

PAGE = 4096


def opened(path: Path) -> lmdb.Environment:
    return lmdb.open(str(path), subdir=False, map_size=1 << 26, sync=False, lock=False)


def filled(path: Path, chance: random.Random, rounds: int) -> dict[bytes, bytes]:
    """A file with a history: values of every length put, replaced and deleted, in transactions of every size."""
    expected: dict[bytes, bytes] = {}
    env = opened(path)
    for _ in range(rounds):
        with env.begin(write=True) as transaction:
            for _ in range(chance.choice((1, 3, 100))):
                key = chance.choice((b"k", b"long " * 30)) + str(chance.randrange(300)).encode()
                if chance.randrange(3) == 0:
                    transaction.delete(key)
                    expected.pop(key, None)
                else:
                    size = chance.choice((0, 9, 700, 2000, 4080, 4081, 9000, 100_000))
                    expected[key] = bytes([chance.randrange(256)]) * size
                    transaction.put(key, expected[key])
        if chance.randrange(20) == 0:
            env.close()
            env = opened(path)
    env.close()
    return expected


@pytest.mark.parametrize("rounds", [0, 1, 2, 30, 300])
def test_what_lmdb_wrote_passes(tmp_path: Path, rounds: int):
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    path = tmp_path / "data"
    filled(path, random.Random(seed), rounds)
    pages.check(str(path))
    # Deleted to the last, and filled again.
    env = opened(path)
    with env.begin(write=True) as transaction, transaction.cursor() as cursor:
        while cursor.first():
            cursor.delete()
    pages.check(str(path))
    with env.begin(write=True) as transaction:
        for number in range(5_000):
            transaction.put(b"%d" % number, bytes(number % 50))
    pages.check(str(path))
    env.close()


def test_beside_a_process_that_writes(tmp_path: Path):
    path = tmp_path / "data"
    env = lmdb.open(str(path), subdir=False, map_size=1 << 26, sync=False)
    pid = os.fork()
    if pid == 0:
        writer = None
        try:
            env = None
            import subprocess
            import sys

            code = (
                "import lmdb, sys\n"
                "env = lmdb.open(sys.argv[1], subdir=False, map_size=1 << 26, sync=False)\n"
                "for n in range(3000):\n"
                "    with env.begin(write=True) as t:\n"
                "        t.put(b'%d' % (n % 40), bytes(n % 9000))\n"
            )
            writer = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
        finally:
            os._exit(1 if writer is None else writer.returncode)
    looks = 0
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        with env.begin():
            pages.check(str(path))
        looks += 1
    assert looks > 10
    env.close()


def sound(path: Path) -> bytes:
    filled(path, random.Random(1), 25)
    return path.read_bytes()


def used_pages(data: bytes) -> dict[int, int]:
    """Number to flags of the pages that look like pages in use."""
    found = {}
    for number in range(2, len(data) // PAGE):
        bears, _, flags = struct.unpack_from("<QHH", data, number * PAGE)
        if bears == number and flags in (1, 2, 4):
            found[number] = flags
    return found


def is_refused(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    try:
        pages.check(str(path))
    except pages.Damage:
        return True
    return False


def test_a_flipped_bit_in_the_header_of_any_page_in_use_is_found(tmp_path: Path):
    path = tmp_path / "data"
    data = sound(path)
    assert not is_refused(path, data)
    caught = 0
    for number in used_pages(data):
        flipped = bytearray(data)
        flipped[number * PAGE] ^= 1  # its own number
        caught += is_refused(path, bytes(flipped))
    # What is not found stands in pages that are free, and only look as if they were in use.
    assert caught > len(used_pages(data)) // 4


@pytest.mark.parametrize("length", [0, 10, 100, PAGE, PAGE + 100, 2 * PAGE, 3 * PAGE + 7])
def test_a_file_that_is_cut_short_is_found(tmp_path: Path, length: int):
    path = tmp_path / "data"
    assert is_refused(path, sound(path)[:length]) == (length > 0)


def test_an_older_state_that_a_flipped_bit_makes_the_newest_is_found(tmp_path: Path):
    path = tmp_path / "data"
    data = bytearray(sound(path))
    places = [16 + 24 + 2 * 48 + 8 + number * PAGE for number in range(2)]
    older = min(places, key=lambda place: struct.unpack_from("<Q", data, place))
    data[older + 3] ^= 1
    assert is_refused(path, bytes(data))


def test_every_flipped_bit_is_found_or_harms_nobody(tmp_path: Path):
    """Harmless: LMDB, in a process that may die of it, writes all anew, and all is there but values that were hit."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    path = tmp_path / "data"
    data = sound(path)
    refused = 0
    places = [0, 1, *used_pages(data)]
    for _ in range(60):
        flipped = bytearray(data)
        page = chance.choice(places)
        flipped[page * PAGE + chance.choice((chance.randrange(32), chance.randrange(PAGE)))] ^= 1 << chance.randrange(8)
        if is_refused(path, bytes(flipped)):
            refused += 1
            continue
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = _rewrite(path)
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert refused > 0


def _rewrite(path: Path) -> int:
    env = opened(path)
    with env.begin() as transaction, transaction.cursor() as cursor:
        before = [(bytes(key), bytes(value)) for key, value in cursor]
    for turn in range(4):
        with env.begin(write=True) as transaction:
            for key, value in before:
                transaction.put(key, value)
            for number in range(200):
                transaction.put(b"filler %d %d" % (turn, number), bytes([turn]) * 3000)
    with env.begin() as transaction:
        return int(any(transaction.get(key) != value for key, value in before))
