"""The registry alone: its rules one by one."""

from __future__ import annotations

import pytest
from registry_world import EMPTY, World

from etha.errors import (
    DeadlockError,
    InvalidArgument,
    LeaseTimeout,
    MappingTimeout,
    NameTaken,
    NoPublication,
    NotOwner,
    OwnerDiedError,
    PublicationClosed,
    StaleHandle,
    TornError,
    VersionGone,
    VersionTimeout,
)
from etha.tensor_bus.claim_table import CloseMemory
from etha.tensor_bus.claims import (
    LIVE,
    TRANSITIONS,
    Closing,
    Event,
    ImpossibleTransition,
    Phase,
    Publication,
    Rebinding,
    Suspending,
    command_number,
    command_sequence,
)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def owner(world: World) -> bytes:
    owner = world.client("owner")
    world.register(owner)
    return owner


def reader_of(world: World, name: str, publication: str = "w") -> bytes:
    client = world.client(name)
    assert world.subscribe(client, publication).granted
    return client


def test_a_lease_is_on_the_newest_version(world, owner):
    reader, w = reader_of(world, "reader"), world.publication()
    assert world.read(reader, w).version == 0
    world.publish(owner, w)
    assert world.read(reader, w).version == 1


def test_an_update_waits_for_leases_and_reads_wait_for_it(world, owner):
    a, b, w = reader_of(world, "a"), reader_of(world, "b"), world.publication()
    lease = world.read(a, w)
    update = world.update(owner, w)
    late = world.read(b, w)
    assert not update.granted
    assert not late.granted
    world.release(lease)
    assert update.granted
    assert w.phase is Phase.WRITING
    assert not late.granted
    world.publish(owner, w, update)
    assert (late.granted, late.version, late.guarded) == (True, 1, True)


def test_a_second_read_of_a_thread_that_holds_the_current_version_is_not_held_up(world, owner):
    a, w = reader_of(world, "a"), world.publication()
    world.read(a, w)
    update = world.update(owner, w)
    assert world.read(a, w).granted
    assert not update.granted


def test_overlapping_leases_of_a_clients_threads_do_not_starve_the_writer(world, owner):
    a, w = reader_of(world, "a"), world.publication()
    leases = [world.read(a, w, thread=thread) for thread in range(8)]
    update = world.update(owner, w)
    for thread, lease in enumerate(leases):
        world.release(lease)
        world.read(a, w, thread=thread)
    assert update.granted


def test_a_thread_that_holds_another_threads_version_up_is_no_exception_to_circles(world, owner):
    """What is granted and what is no edge of the graph must be the same: else a circle goes unseen."""
    world.register(owner, "other")
    a, w, other = world.client("a"), world.publication(), world.publication("other")
    world.subscribe(a)
    world.subscribe(a, "other")
    world.read(a, w, thread=1)
    world.read(a, other, thread=2)
    assert not world.update(owner, w, thread=1).granted
    assert not world.read(a, w, thread=2).granted
    assert not world.update(owner, other, thread=2).granted
    assert isinstance(world.failed[world.read(a, other, thread=1)], DeadlockError)


def test_a_replacement_that_came_during_an_update_goes_on_when_the_update_ends(world, owner):
    w = world.publication()
    for end in (world.publish, world.abandon, lambda _owner, _w, update: world.release(update)):
        update = world.update(owner, w)
        taking = world.register(owner, replace=True, thread=2)
        assert not taking.granted
        end(owner, w, update)
        assert taking.granted
        w = world.publication()


def test_only_its_own_process_ends_a_publication_whose_connection_has_ended(world, owner):
    w, stranger = world.publication(), world.client("stranger")
    world.registry.client_orphaned(owner, world.now)
    waiting = world.register(stranger, replace=True, timeout=1.0)
    assert w.phase is Phase.READY
    assert not waiting.granted
    world.die(owner)
    assert waiting.granted


def test_a_closing_has_no_effect_before_it_is_judged(world, owner):
    world.subscribe(owner)
    w = world.publication()
    lease = world.read(owner, w, thread=7)
    closing = Closing(**world._who(owner, 7, 9.0), number=command_number(99), name="w", generation=w.generation)
    world.registry.claim(closing, world.now)
    world.release(world.read(owner, w, thread=8, timeout=0.0))
    assert isinstance(world.failed[closing], DeadlockError)
    world.registry.claim(
        closing2 := Closing(**world._who(owner, 7, 9.0), number=command_number(100), name="w", generation=w.generation),
        world.now,
    )
    world.registry._settle(w, world.now)
    assert w.phase is Phase.READY
    world.run()
    assert isinstance(world.failed[closing2], DeadlockError)
    assert w.phase is Phase.READY
    world.release(lease)


def test_a_version_published_while_it_closes_is_recorded(world, owner):
    w = world.publication()
    world.subscribe(world.client("reader"))
    world.close(owner, w)
    assert w.phase is Phase.CLOSING
    world.registry.publish(owner, w.generation, 1, 0, world.now)
    assert w.generation in world.registry.table.dirty.publications


def test_a_registration_undone_when_it_has_readers_waits_for_their_mappings(world):
    owner, reader, other = world.client("owner"), world.client("reader"), world.client("other")
    claim = world.register(owner)
    mapping = world.subscribe(reader)
    answer = Closing(**world._who(owner, 1, 9.0), number=command_number(99), name="", generation=0)
    world.rung.clear()
    world.registry.undo(claim.number, answer, world.now)
    world.run()
    assert mapping in world.rung
    assert answer not in world.granted
    assert world.register(other).granted
    world.release(mapping)
    assert answer in world.granted


def test_a_writer_that_gives_up_releases_the_reads_behind_it(world, owner):
    a, b, w = reader_of(world, "a"), reader_of(world, "b"), world.publication()
    world.read(a, w)
    update = world.update(owner, w, timeout=1.0)
    late = world.read(b, w)
    world.pass_time(1.0)
    assert isinstance(world.failed[update], LeaseTimeout)
    assert world.failed[update].holder == "pid of a"
    assert (late.granted, late.version) == (True, 0)


def test_revoke_ends_the_leases_at_the_deadline_and_not_before(world, owner):
    a, w = reader_of(world, "a"), world.publication()
    lease = world.read(a, w)
    update = world.update(owner, w, revoke=True, timeout=1.0)
    world.pass_time(0.9)
    assert not update.granted
    world.pass_time(0.1)
    assert update.granted
    assert lease.writes != w.writes
    world.release(lease)
    assert update.granted


def test_a_poll_never_waits(world, owner):
    a, w = reader_of(world, "a"), world.publication()
    world.read(a, w)
    assert isinstance(world.failed[world.update(owner, w, timeout=0.0)], LeaseTimeout)
    assert isinstance(world.failed[world.read(a, w, minimum=1, timeout=0.0)], VersionTimeout)
    assert world.update(owner, w, revoke=True, timeout=0.0).granted
    assert world.registry.table.next_deadline() is None


def test_an_exact_version_is_granted_awaited_or_gone(world, owner):
    a, w = reader_of(world, "a"), world.publication()
    world.publish(owner, w)
    ahead = world.read(a, w, exact=2)
    assert isinstance(world.failed[world.read(a, w, exact=0)], VersionGone)
    assert world.read(a, w, exact=1).granted
    assert not ahead.granted
    world.publish(owner, w)
    assert ahead.granted
    skipped = world.read(a, w, exact=4)
    world.publish(owner, w, version=7)
    assert isinstance(world.failed[skipped], VersionGone)


def test_a_torn_publication_says_so_until_the_next_good_update(world, owner):
    a, w = reader_of(world, "a"), world.publication()
    update = world.update(owner, w)
    waiting = world.read(a, w)
    world.abandon(owner, w, update)
    assert isinstance(world.failed[waiting], TornError)
    assert isinstance(world.failed[world.read(a, w)], TornError)
    mending = world.update(owner, w)
    behind = world.read(a, w)
    assert not behind.granted
    world.publish(owner, w, mending)
    assert behind.version == 1


def test_an_update_given_back_unwritten_leaves_the_version_whole(world, owner):
    a, w = reader_of(world, "a"), world.publication()
    update = world.update(owner, w)
    waiting = world.read(a, w)
    world.release(update)
    assert (waiting.granted, waiting.version) == (True, 0)


def test_a_plain_publish_is_not_guarded(world, owner):
    a, w = reader_of(world, "a"), world.publication()
    world.publish(owner, w)
    assert not world.read(a, w).guarded


def test_versions_only_grow_and_only_the_owner_publishes(world, owner):
    stranger, w = world.client("stranger"), world.publication()
    world.publish(owner, w, version=5)
    with pytest.raises(ValueError, match="not larger"):
        world.publish(owner, w, version=5)
    with pytest.raises(NotOwner):
        world.publish(stranger, w)
    assert isinstance(world.failed[world.update(stranger, w)], NotOwner)
    assert isinstance(world.failed[world.close(stranger, w)], NotOwner)
    assert w.version == 5


def test_a_publish_that_is_no_part_of_the_update_is_refused(world, owner):
    w = world.publication()
    update = world.update(owner, w)
    with pytest.raises(ValueError, match="is being updated"):
        world.publish(owner, w)
    world.publish(owner, w, update)
    with pytest.raises(ValueError, match="not being updated"):
        world.publish(owner, w, update)


def test_closing_refuses_reads_and_waits_for_leases_and_mappings(world, owner):
    reader, w = world.client("reader"), world.publication()
    mapping = world.subscribe(reader)
    lease = world.read(reader, w)
    waiting = world.read(reader, w, minimum=1)
    closing = world.close(owner, w)
    assert isinstance(world.failed[waiting], PublicationClosed)
    assert isinstance(world.failed[world.read(reader, w)], PublicationClosed)
    world.release(lease)
    assert not closing.granted
    world.release(mapping)
    assert closing.granted
    assert world.registry.names == {}
    assert world.registry.publications == {}


def test_who_maps_anew_what_is_over_is_told_so_and_gets_nothing_else_of_that_name(world, owner):
    """Its lease is on memory that lies elsewhere now, whose owner died, or closes it, before it was mapped."""
    reader, other, w = world.client("reader"), world.client("other"), world.publication()
    world.subscribe(reader)
    assert world.subscribe(reader, follows=w.generation).granted
    w.recovering = True  # so that it waits
    waiting = world.subscribe(reader, follows=w.generation)
    assert waiting not in world.failed
    world.die(owner)
    assert isinstance(world.failed[waiting], OwnerDiedError)
    assert isinstance(world.failed[world.subscribe(reader, follows=w.generation)], OwnerDiedError)
    world.register(other)
    assert isinstance(world.failed[world.subscribe(reader, follows=w.generation)], OwnerDiedError)
    new = world.registry.names["w"]
    world.subscribe(reader)
    world.close(other, new)
    assert isinstance(world.failed[world.subscribe(reader, follows=new.generation)], PublicationClosed)
    assert isinstance(world.failed[world.subscribe(reader, follows=999)], StaleHandle)


def test_a_closing_that_times_out_names_the_holder_and_opens_again(world, owner):
    reader, w = world.client("reader"), world.publication()
    world.subscribe(reader)
    lease = world.read(reader, w)
    first = world.close(owner, w, timeout=1.0)
    world.pass_time(1.0)
    assert isinstance(world.failed[first], LeaseTimeout)
    world.release(lease)
    second = world.close(owner, w, timeout=1.0)
    world.pass_time(1.0)
    assert isinstance(world.failed[second], MappingTimeout)
    assert world.failed[second].holder == "pid of reader"
    assert world.read(reader, w).granted


def test_the_death_of_a_reader_frees_the_owner(world, owner):
    a, w = reader_of(world, "a"), world.publication()
    for _ in range(100):
        world.read(a, w)
    update = world.update(owner, w)
    world.die(a)
    assert update.granted
    assert w.imports == {}


def test_the_death_of_the_owner_tells_readers_and_frees_the_name(world, owner):
    reader, w = world.client("reader"), world.publication()
    mapping = world.subscribe(reader)
    waiting = world.read(reader, w, minimum=1)
    world.rung.clear()
    world.die(owner)
    assert isinstance(world.failed[waiting], OwnerDiedError)
    assert isinstance(world.failed[world.read(reader, w)], OwnerDiedError)
    assert mapping in world.rung
    successor = world.client("successor")
    assert world.register(successor).granted
    assert world.publication().generation > w.generation
    world.release(mapping)
    assert isinstance(world.failed[world.read(reader, w)], StaleHandle)


def test_the_end_of_a_connection_takes_nothing_away(world, owner):
    a, w = reader_of(world, "a"), world.publication()
    world.read(a, w)
    waiting = world.read(a, w, minimum=5)
    world.registry.client_orphaned(a, world.now)
    world.run()
    assert waiting.id not in world.registry.table.claims
    assert not world.update(owner, w, timeout=0.0).granted
    world.die(a)
    assert world.update(owner, w, timeout=0.0).granted


def test_a_name_is_taken_from_the_living_never_and_from_the_dying_later(world, owner):
    other = world.client("other")
    assert isinstance(world.failed[world.register(other)], NameTaken)
    world.registry.client_orphaned(owner, world.now)
    waiting = world.register(other)
    assert not waiting.granted
    world.die(owner)
    assert waiting.granted


def test_replace_takes_over_within_one_process_only(world, owner):
    reader, w = world.client("reader"), world.publication()
    mapping = world.subscribe(reader)
    sibling = world.client("sibling", pid=sum(b"owner"))
    stranger = world.client("stranger")
    assert isinstance(world.failed[world.register(stranger, replace=True)], NameTaken)
    taking = world.register(sibling, replace=True, timeout=1.0)
    assert not taking.granted
    world.pass_time(1.0)
    assert isinstance(world.failed[taking], MappingTimeout)
    assert world.publication() is w
    assert w.phase is Phase.READY
    taking = world.register(sibling, replace=True)
    world.release(mapping)
    assert taking.granted
    assert world.publication().owner == sibling


def test_a_subscription_waits_for_the_publication(world):
    reader, owner = world.client("reader"), world.client("owner")
    early = world.subscribe(reader, timeout=1.0)
    world.pass_time(1.0)
    assert isinstance(world.failed[early], NoPublication)
    later = world.subscribe(reader)
    world.register(owner)
    assert later.granted


def test_a_registration_undone_leaves_nothing(world):
    owner = world.client("owner")
    claim = world.register(owner)
    answer = Closing(
        client=owner, number=command_number(99), actor=(1, 1), label="", name="", generation=0, deadline=9, since=0
    )
    world.registry.undo(claim.number, answer, world.now)
    world.run()
    assert answer in world.granted
    assert world.registry.names == {}
    assert world.registry.publications == {}
    assert world.registry.table.claims == {}


def test_waiting_for_oneself_is_refused(world, owner):
    w = world.publication()
    assert world.subscribe(owner).granted
    lease = world.read(owner, w, thread=7)
    error = world.failed[world.update(owner, w, thread=7)]
    assert isinstance(error, DeadlockError)
    assert "thread 7" in error.holder
    assert not world.update(owner, w, thread=8, timeout=1.0).granted
    world.pass_time(1.0)
    assert isinstance(world.failed[world.close(owner, w, thread=7)], DeadlockError)
    world.release(lease)
    update = world.update(owner, w, thread=7)
    assert isinstance(world.failed[world.read(owner, w, thread=7)], DeadlockError)
    assert isinstance(world.failed[world.update(owner, w, thread=7)], DeadlockError)
    assert update.granted


def test_two_publications_in_crossed_order_are_refused(world):
    a, b = world.client("a"), world.client("b")
    world.register(a, "p")
    world.register(b, "q")
    world.subscribe(a, "q")
    world.subscribe(b, "p")
    p, q = world.publication("p"), world.publication("q")
    assert world.update(a, p).granted
    assert world.update(b, q).granted
    waiting = world.read(a, q)
    assert waiting not in world.failed
    assert isinstance(world.failed[world.read(b, p)], DeadlockError)


def test_a_reader_that_waits_for_the_writer_that_waits_for_it_is_a_cycle(world, owner):
    a, w = reader_of(world, "a"), world.publication()
    world.read(a, w)
    world.read(a, w, minimum=1)
    assert isinstance(world.failed[world.update(owner, w)], DeadlockError)
    assert world.update(owner, w, revoke=True, timeout=1.0) not in world.failed


def test_only_subscribers_read(world, owner):
    stranger, w = world.client("stranger"), world.publication()
    assert isinstance(world.failed[world.read(stranger, w)], StaleHandle)


def test_what_the_table_does_not_know_cannot_happen():
    publication = Publication(1, "w", b"", 1, EMPTY, 0, 0.0, phase=Phase.CLOSED)
    with pytest.raises(ImpossibleTransition):
        publication.move(Event.UPDATE)
    for phase in LIVE:
        assert TRANSITIONS[phase, Event.OWNER_DIED] is Phase.DEAD


def test_command_and_request_numbers_do_not_meet():
    assert command_sequence(command_number(5)) == 5
    assert command_sequence(5) is None


def test_deadlines_of_the_granted_do_not_pile_up(world, owner):
    a, w = reader_of(world, "a"), world.publication()
    for _ in range(2000):
        update = world.update(owner, w)
        waiting = world.read(a, w)
        world.publish(owner, w, update)
        world.release(waiting)
    assert len(world.registry.table._deadlines) < 200


# -- memory that moves -------------------------------------------------------------------------------------------------


def test_a_suspending_waits_for_every_mapping_and_wakes_who_waits(world, owner):
    a, b, w = world.client("a"), world.client("b"), world.publication()
    ours, theirs = world.subscribe(a), world.subscribe(b)
    waiting = world.read(a, w, minimum=1)
    update = world.update(owner, w)
    suspending = world.suspend(owner, w, update)
    assert world.asked == [waiting]
    assert set(world.rung) >= {ours, theirs}
    world.unmap(ours)
    assert not suspending.granted
    again = world.read(a, w, minimum=1)
    assert again not in world.asked
    asked = world.read(b, w)
    assert world.asked[-1] is asked
    world.unmap(theirs)
    assert suspending.granted
    assert w.suspended
    assert not w.memory_open
    rebinding = world.rebind(owner, w, update)
    assert rebinding.granted
    assert (w.layout, w.suspended, w.memory_open) == (2, False, True)
    world.publish(owner, w, update)
    assert again.version == 1


def test_a_suspending_that_is_too_late_names_who_has_it_mapped_and_changes_nothing(world, owner):
    reader, w = reader_of(world, "reader"), world.publication()
    update = world.update(owner, w)
    suspending = world.suspend(owner, w, update, timeout=1.0)
    world.pass_time(1.0)
    error = world.failed[suspending]
    assert isinstance(error, MappingTimeout)
    assert error.holder == "pid of reader"
    world.release(update)
    assert world.read(reader, w).version == 0


def test_memory_moves_only_within_its_own_update(world, owner):
    w = world.publication()
    update = world.update(owner, w)
    world.release(update)
    assert isinstance(world.failed[world.rebind(owner, w, update)], InvalidArgument)
    assert isinstance(world.failed[world.suspend(owner, w, update)], InvalidArgument)
    stranger = world.client("stranger")
    assert isinstance(world.failed[world.suspend(stranger, w, update)], NotOwner)


def test_what_is_suspended_cannot_be_published_and_can_be_closed(world, owner):
    reader, w = reader_of(world, "reader"), world.publication()
    update = world.update(owner, w)
    suspending = world.suspend(owner, w, update)
    world.unmap(next(iter(w.imports.values())))
    assert suspending.granted
    with pytest.raises(InvalidArgument):
        world.publish(owner, w, update)
    late = world.read(reader, w)
    world.release(update)
    assert not late.granted
    closing = world.close(owner, w)
    assert closing.granted
    assert isinstance(world.failed[late], PublicationClosed)


def test_the_oldest_layout_is_that_of_the_slowest_reader(world, owner):
    a, b, w = world.client("a"), world.client("b"), world.publication()
    old = world.subscribe(a)
    update = world.update(owner, w)
    world.rebind(owner, w, update)
    world.publish(owner, w, update)
    assert world.subscribe(b).layout == 2
    assert w.oldest_layout == 1
    world.unmap(old)
    assert w.oldest_layout == 2


def test_an_owner_that_dies_while_its_memory_moves(world, owner):
    reader_of(world, "reader")
    w = world.publication()
    update = world.update(owner, w)
    suspending = world.suspend(owner, w, update)
    world.die(owner)
    assert suspending in world.failed
    assert w.phase is Phase.DEAD
    assert "w" not in world.registry.names


def test_who_subscribes_while_the_agent_closes_the_memory_waits_for_the_owners_return(world: World):
    owner, reader = world.client("owner"), world.client("reader")
    generation = world.register(owner).generation
    publication = world.registry.publications[generation]
    update = world.update(owner, publication)
    about = {**world._who(owner, 1, 9.0), "name": publication.name, "generation": generation, "update": update.number}
    world.registry.suspend(Suspending(**about, number=command_number(next(world.numbers))), world.now)
    assert world.registry.table.take_effects() == [CloseMemory(generation)]
    late = world.subscribe(reader)
    assert not late.granted
    world.registry.memory_closed(generation, world.now)
    world.run()
    assert not late.granted
    back = Rebinding(**about, number=command_number(next(world.numbers)), manifest=EMPTY)
    world.registry.rebind(back, world.now)
    world.registry.rebound(generation, world.now)
    world.run()
    assert back in world.granted
    assert late in world.granted
    assert late.layout == publication.layout == 2


def test_a_read_through_an_import_that_is_over_keeps_no_memory(world, owner):
    """Another thread of its reader has closed the subscription, or mapped anew."""
    reader, w = reader_of(world, "reader"), world.publication()
    (held,) = w.imports.values()
    read = world.read(reader, w, minimum=1)
    world.release(held)
    update = world.update(owner, w)
    suspending = Suspending(
        client=owner,
        number=command_number(99),
        actor=update.actor,
        label="",
        name="w",
        generation=w.generation,
        deadline=9.0,
        since=0.0,
        update=update.number,
    )
    world.registry.suspend(suspending, world.now)
    world.run()
    assert suspending in world.granted
    assert w.suspended
    assert read in w.queue
