"""Row 29: every pair and cycle of waits is granted, refused with `DeadlockError`, or timed out; never hung."""

from __future__ import annotations

import itertools
import os
import random

import pytest
from box import Box, until
from harness import Raised


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    box = Box("waits", tmp_path_factory.mktemp("waits"))
    yield box
    assert box.close() == ""


@pytest.fixture(scope="module")
def workers(box):
    return [box.worker("second = bootstrap_client()[0]; one = Lane(); two = Lane()") for _ in range(3)]


_names = (f"w{number}" for number in itertools.count())


@pytest.fixture
def worker(box, workers):
    """A worker that owns ``a`` and ``b`` by ``client`` and reads them by ``client`` and by ``second``."""
    worker, a, b = workers[0], next(_names), next(_names)
    worker.do(
        f"A, B = {a!r}, {b!r}\n"
        "a = client.register_tensors(A, {'x': shared()}); b = client.register_tensors(B, {'x': shared()})\n"
        "ra, rb = client.subscribe(A), client.subscribe(B)\n"
        "sa, sb = second.subscribe(A), second.subscribe(B)"
    )
    yield worker
    # Whatever happened: everything is to be had again at once, and nothing stays behind.
    for name in (a, b):
        until(lambda name=name: box.claims(name) == [])
    assert worker.do("poll_wins(a) and poll_wins(b)") is True
    worker.do("for s in (ra, rb, sa, sb): s.close()\na.close(10); b.close(10)")


def raises(kind: str):
    return pytest.raises(Raised, match=f"^{kind}:")


# -- one thread ---------------------------------------------------------------------------------------


def test_reads_nest_in_one_thread(worker):
    assert worker.do(
        "with ra.read() as x, ra.read() as y, sa.read() as z, rb.read() as w: v = [l.version for l in (x, y, z, w)]\nv"
    ) == [0, 0, 0, 0]


@pytest.mark.parametrize("subscription", ["ra", "sa"])
def test_an_update_under_ones_own_lease_is_refused(worker, subscription):
    worker.do(f"lease = {subscription}.read()")
    assert worker.do("outcome(lambda: write_once(a, 20), 0)") == "DeadlockError"
    assert worker.do("outcome(lambda: write_once(a, 0), 0)") == "LeaseTimeout"
    assert worker.do("lease.check(); lease.release(); write_once(a)") == 1


def test_an_update_that_may_revoke_ends_ones_own_lease(worker):
    worker.do("lease = ra.read()")
    assert worker.do("outcome(lambda: write_once(a, 0.2, on_timeout='revoke'), 0.2)") == 1
    with raises("TornError"):
        worker.do("lease.check()")
    worker.do("lease.release()")


@pytest.mark.parametrize("subscription", ["ra", "sa"])
def test_a_read_under_ones_own_update_is_refused(worker, subscription):
    worker.do("update = enter_update(a)")
    assert worker.do(f"outcome(lambda: {subscription}.read(timeout=20), 0)") == "DeadlockError"
    assert worker.do(f"outcome(lambda: {subscription}.read(timeout=0), 0)") == "LeaseTimeout"
    assert worker.do(f"outcome(lambda: {subscription}.read(version=1, timeout=20), 0)") == "DeadlockError"
    worker.do("leave_update(update)")
    assert worker.do(f"with {subscription}.read(version=1): v = 1\nv") == 1


def test_an_update_within_an_update_of_the_same_is_refused_and_of_another_granted(worker):
    worker.do("update = enter_update(a)")
    assert worker.do("outcome(lambda: write_once(a, 20), 0)") == "DeadlockError"
    assert worker.do("outcome(lambda: write_once(b, 20), 0)") == 1
    worker.do("leave_update(update)")


def test_a_close_under_ones_own_lease_or_update_is_refused(worker):
    worker.do("lease = sa.read()")
    assert worker.do("outcome(lambda: a.close(20), 0)") == "DeadlockError"
    worker.do("lease.release(); update = enter_update(a)")
    assert worker.do("outcome(lambda: a.close(20), 0)") == "DeadlockError"
    worker.do("leave_update(update)")
    assert worker.do("outcome(lambda: a.close(0.2), 0.2)") == "MappingTimeout"
    assert worker.do("write_once(a)") == 2


def test_a_read_of_a_version_that_nobody_writes_times_out(worker):
    assert worker.do("outcome(lambda: ra.read(min_version=9, timeout=0.2), 0.2)") == "VersionTimeout"
    worker.do("lease = ra.read()")
    assert worker.do("outcome(lambda: ra.read(version=1, timeout=0.2), 0.2)") == "VersionTimeout"
    worker.do("lease.release()")


# -- two threads --------------------------------------------------------------------------------------


def test_while_a_writer_waits_the_thread_that_it_waits_for_may_read_on_and_others_wait(worker):
    worker.do("lease = ra.read(); waiting = one.start(write_once, a); waits(client, A)")
    assert worker.do("with ra.read(timeout=0) as x, sa.read(timeout=0) as y: v = (x.version, y.version)\nv") == (0, 0)
    assert worker.do("two.run(lambda: outcome(lambda: ra.read(timeout=0), 0))") == "LeaseTimeout"
    assert worker.do("outcome(lambda: ra.read(min_version=1, timeout=20), 0)") == "DeadlockError"
    # A thread that holds nothing waits for the version that is to come.
    worker.do("reading = two.start(lambda: sa.read(timeout=20)); waits(client, A, 2)")
    assert worker.do("lease.release(); waiting.result(20)") == 1
    assert worker.do("late = reading.result(20); v = late.version; late.release(); v") == 1


def test_a_writer_that_gives_up_releases_the_reads_behind_it(worker):
    worker.do("lease = ra.read(); waiting = one.start(outcome, lambda: write_once(a, 0.3), 0.3); waits(client, A)")
    worker.do("reading = two.start(lambda: sa.read(timeout=20))")
    assert worker.do("waiting.result(20)") == "LeaseTimeout"
    assert worker.do("late = reading.result(20); v = late.version; late.release(); lease.release(); v") == 0


def test_a_lease_of_another_thread_is_waited_for_and_named(worker):
    worker.do("lease = one.run(lambda: sa.read())")
    with pytest.raises(Raised) as raised:
        worker.do("write_once(a, 0.2)")
    assert raised.value.kind == "LeaseTimeout"
    assert f"pid {worker.pid} " in raised.value.holder
    worker.do("waiting = two.start(write_once, a); waits(client, A); one.run(lease.release)")
    assert worker.do("waiting.result(20)") == 1


def test_two_threads_that_update_one_publication_take_turns(worker):
    worker.do("update = enter_update(a); waiting = one.start(write_once, a); waits(client, A)")
    assert worker.do("outcome(lambda: write_once(a, 20), 0)") == "DeadlockError"
    assert worker.do("two.run(lambda: outcome(lambda: write_once(a, 0.2), 0.2))") == "LeaseTimeout"
    assert worker.do("leave_update(update); (waiting.result(20), a.version)") == (2, 2)


@pytest.mark.parametrize(
    ("hold_a", "hold_b", "want_b", "want_a"),
    [
        ("enter_update(a)", "enter_update(b)", "enter_update(b)", "enter_update(a)"),
        ("enter_update(a)", "enter_update(b)", "sb.read(timeout=20)", "sa.read(timeout=20)"),
        ("ra.read()", "rb.read()", "enter_update(b)", "enter_update(a)"),
        ("sa.read()", "enter_update(b)", "sb.read(timeout=20)", "enter_update(a)"),
        ("sa.read()", "rb.read()", "enter_update(b)", "a.close(20)"),
    ],
)
def test_two_publications_in_crossed_order(worker, hold_a, hold_b, want_b, want_a):
    end = "leave_update(%s) if hasattr(%s, '__exit__') and not hasattr(%s, 'release') else %s.release()"
    worker.do(f"first = one.run(lambda: {hold_a}); other = two.run(lambda: {hold_b})")
    worker.do(f"waiting = one.start(lambda: {want_b}); waits(client, B)")
    assert worker.do(f"two.run(lambda: outcome(lambda: {want_a}, 0))") == "DeadlockError"
    # The one that was refused goes back; then the other goes on.
    worker.do(f"two.run(lambda: {end % (('other',) * 4)}); got = waiting.result(20)")
    worker.do(f"one.run(lambda: {end % (('got',) * 4)}); one.run(lambda: {end % (('first',) * 4)})")


def test_the_longest_timeout_is_a_timeout(worker):
    worker.do("reading = one.start(lambda: sa.read(min_version=1, timeout=1e6)); waits(client, A)")
    assert worker.do("write_once(a, 1e6)") == 1
    assert worker.do("late = reading.result(20); v = late.version; late.release(); v") == 1


# -- processes ----------------------------------------------------------------------------------------


def test_a_ring_of_three_processes_is_refused_where_it_closes(box, workers):
    names = [next(_names) for _ in workers]
    for worker, name in zip(workers, names, strict=True):
        worker.do(f"mine = client.register_tensors({name!r}, {{'x': shared()}})")
    for index, worker in enumerate(workers):
        worker.do(f"next_one = second.subscribe({names[(index + 1) % 3]!r}); update = enter_update(mine)")
    for index in (0, 1):
        workers[index].say("lease = next_one.read(timeout=20); v = lease.version; lease.release(); v")
        until(lambda index=index: box.claims(names[index + 1], granted=False))
    with pytest.raises(Raised) as raised:
        workers[2].do("next_one.read(timeout=20)", 1.0)
    assert raised.value.kind == "DeadlockError"
    assert all(f"pid {worker.pid} " in raised.value.holder for worker in workers)
    # Each lets go in turn, from the end of the ring; each read behind it then has what was written.
    workers[2].do("leave_update(update)")
    assert workers[1].hear() == 1
    workers[1].do("leave_update(update)")
    assert workers[0].hear() == 1
    workers[0].do("leave_update(update)")
    for worker in workers:
        worker.do("next_one.close()")
    for worker in workers:
        worker.do("mine.close(10)")


# -- at random ----------------------------------------------------------------------------------------


def run_rounds(box, workers, rounds: int, seed: int) -> dict[str, int]:
    """Random nests of waits by three threads of each process; every call is bounded, nothing stays."""
    names = [next(_names) for _ in range(2 * len(workers))]
    for index, worker in enumerate(workers):
        worker.do("import wait_rounds")
        worker.do(f"rig = wait_rounds.Rig({names[2 * index : 2 * index + 2]!r}, {seed + index})")
    for worker in workers:
        worker.do(f"rig.subscribe({names!r})")
    for worker in workers:
        worker.say(f"rig.run({rounds // len(workers)})")
    total: dict[str, int] = {}
    for worker in workers:
        for word, count in worker.hear(60 + rounds).items():
            total[word] = total.get(word, 0) + count
    for name in names:
        until(lambda name=name: box.claims(name) == [])
    for worker in workers:
        worker.do("rig.unsubscribe()")
    for worker in workers:
        worker.do("rig.end()")
    return total


def check_random_waits(box, workers, rounds: int) -> None:
    seed = int(os.environ.get("ETHA_SEED", random.randrange(1 << 30)))
    print("ETHA_SEED =", seed)
    total = run_rounds(box, workers, rounds, seed)
    print(f"{rounds} rounds:", total)
    # The scenarios meet everything that they are for.
    assert {"read", "update", "DeadlockError", "LeaseTimeout", "VersionTimeout"} <= total.keys()


def test_random_waits(box, workers):
    check_random_waits(box, workers, 120)


@pytest.mark.stress
def test_a_thousand_rounds_of_random_waits(box, workers):
    check_random_waits(box, workers, 1000)
