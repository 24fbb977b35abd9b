"""The queue outlives its process, and a learner that goes back in time takes its books with it."""

import asyncio
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from actors.actor import Lease
from actors.codec import DamagedError, decode, encode
from actors.rollout import REWARD_FAILED, Version
from learner.replay import snapshot
from learner.replay.clients import WEIGHTS
from learner.replay.cuts import STATE
from learner.replay.journal import Journal, read_base
from learner.replay.line import Rules
from learner.replay.queue import ReplayQueue
from learner.replay.records import Batch
from learner.replay.service import QueueService
from learner.replay.settings import Settings
from tests.unit.test_queue import answer, small

ACTORS = 3


def service(folder: Path, **changes) -> QueueService:
    plan = small(
        **(
            {"round_groups": 3, "passes": 2, "lockstep": False, "max_age": 20, "batches": 10_000}
            | changes
        )
    )
    return QueueService(Settings(plan, 1, Rules(2, 0.9, 1000), 60.0, str(folder / "journal")))


class Play:
    """Random actors and a learner on one service, one operation at a time."""

    def __init__(self, queue: QueueService, seed: int) -> None:
        self.queue, self.rng = queue, np.random.default_rng(seed)
        self.leases: list[Lease] = []
        self.lineage = 0

    async def publish(self) -> None:
        inner = self.queue.queue
        await self.queue.publish(inner.version, [f"w{inner.version.step}"])

    async def act(self) -> None:
        service, inner, rng = self.queue, self.queue.queue, self.rng
        action = rng.integers(4)
        if action == 0:
            actor = int(rng.integers(ACTORS))
            lease = inner.lease(actor)
            if lease:
                service._note({"do": "lease", "actor": actor, "slot": 0, "done": None})
                self.leases.append(lease)
        elif action == 1 and self.leases:
            lease = self.leases.pop(int(rng.integers(len(self.leases))))
            failures = {0: REWARD_FAILED} if rng.random() < 0.2 else None
            await service.put(lease, answer(lease, 2, failures))
        elif action == 2 and rng.random() < 0.1:
            await service.release(int(rng.integers(ACTORS)))
        elif not inner.finished and self.can_get():
            number = inner.committed
            stepped = bool(rng.random() < 0.9)
            derived = {"reference_logp_K": np.full(6 * inner.plan.groups_per_batch, number)}
            await service.commit(self.lineage, number, 0, stepped, derived, ["w"], "")
        assert inner.ledger.balanced

    def can_get(self) -> bool:
        """`QueueService.get` without the wait."""
        inner = self.queue.queue
        was_open, expired = inner.is_open(inner.committed), self.queue._expired()
        batch = inner.get(self.lineage, inner.committed, 0)
        if (batch and not was_open) or self.queue._expired() != expired:
            self.queue._note({"do": "freeze", "number": inner.committed})
        return batch is not None

    async def many(self, count: int) -> None:
        for _ in range(count):
            await self.act()


def state(queue: ReplayQueue) -> dict:
    """What `take` takes, without times and without weights, of which a restart knows none."""
    tree = decode(encode(snapshot.take(queue)))
    tree["weights"] = None
    for group in tree["held"]["groups"] if tree["held"] else ():
        group.pop()
    return tree


def same(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return a == b


async def cut(play: Play, folder: Path) -> None:
    folder.mkdir()
    await play.queue.cut(play.queue.queue.committed, str(folder))
    await play.queue.written(play.queue.queue.committed, str(folder))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ready", [False, True])
def test_a_queue_whose_process_died_comes_back_as_it_was(tmp_path, seed, ready):
    async def story() -> None:
        play = Play(service(tmp_path, ready_order=ready), seed)
        await play.publish()
        await play.many(150)
        await cut(play, tmp_path / "cut")
        await play.many(250)
        again = service(tmp_path, ready_order=ready)
        assert same(state(again.queue), state(play.queue.queue))
        assert again.queue.ledger.balanced and again.queue.committed > 10

    asyncio.run(story())


def positions_alive(queue: ReplayQueue) -> Counter[int]:
    return Counter(group.position for group in [*queue.line.groups, *queue.held])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("died", [False, True])
def test_a_roll_back_undoes_what_undone_weights_made_and_nothing_else(tmp_path, seed, died):
    async def story() -> None:
        play = Play(service(tmp_path), seed)
        await play.publish()
        await play.many(200)
        await cut(play, tmp_path / "cut")
        at_cut = play.queue.queue
        before, counts = state(at_cut), at_cut.ledger.counts()
        await play.many(300)
        undone_steps = play.queue.queue.version.step - before["version"][1]
        if died:
            play.queue, play.leases = service(tmp_path), []
        lineage, batch = await play.queue.roll_back(str(tmp_path / "cut"), actors_died=died)
        queue = play.queue.queue
        assert undone_steps > 5 and (lineage, batch) == (1, before["committed"])
        assert queue.version == Version(1, before["version"][1]) and queue.ledger.balanced
        after = state(queue)
        assert after["ledger"]["reuse"] == before["ledger"]["reuse"]
        assert after["ledger"]["age"] == before["ledger"]["age"]
        assert queue.ledger.retired["exhausted"] == counts["retired"]["exhausted"]
        assert queue.ledger.retired["rolled_back"] > 0
        assert set(positions_alive(queue).values()) == {1}
        for held in [*queue.held.values(), *queue.line.groups.values()]:
            assert held is None or held.oldest <= queue.version.step
        play.lineage = lineage
        await play.publish()
        await play.many(600)
        queue = play.queue.queue
        assert max(queue.ledger.reuse) <= 2 and queue.committed > batch + 20
        assert queue.ledger.retired["expired"] == queue.ledger.retired["lost"] == 0

    asyncio.run(story())


def test_an_exchange_that_comes_twice_puts_nothing_twice_and_gives_the_lease_in_hand(tmp_path):
    async def story() -> None:
        queue = service(tmp_path)
        await queue.publish(Version(0, 0), ["w0"])
        first = await queue.lease(0)
        call = first, answer(first, 2), None, 0, 0
        second = queue.exchange(*call)
        counts = queue.queue.ledger.counts()
        again = queue.exchange(*call)  # repeated, after a restart, say
        assert isinstance(second, Lease) and again.groups == second.groups != first.groups
        assert queue.queue.ledger.counts() == counts and counts["queued"] == 2
        assert service(tmp_path).queue.ledger.counts() == counts  # so says the journal

    asyncio.run(story())


def test_a_queue_from_its_journal_has_no_weights_for_the_leases_that_are_out(tmp_path):
    async def story() -> None:
        queue = service(tmp_path)
        await queue.publish(Version(0, 0), ["w0"])
        lease = await queue.lease(0)
        assert isinstance(lease, Lease)
        assert await queue.weights(lease.id, lease.version) == ["w0"]
        assert await queue.weights(lease.id, Version(0, 1)) is None  # not of that version
        assert await queue.weights(lease.id + 1, lease.version) is None
        assert await service(tmp_path).weights(lease.id, lease.version) is None
        await queue.put(lease, answer(lease, 2))
        assert await queue.weights(lease.id, lease.version) is None  # out no more

    asyncio.run(story())


def test_a_queue_from_its_journal_asks_for_all_weights_also_after_a_commit_brings_the_newest(
    tmp_path,
):
    async def story() -> None:
        queue = service(tmp_path, passes=1, lag=2)
        await queue.publish(Version(0, 0), ["w0"])
        for _ in range(3):
            lease = await queue.lease(0)
            assert isinstance(lease, Lease)
            await queue.put(lease, answer(lease, 2))
        batch = await queue.get(0, 0, 0)
        assert isinstance(batch, Batch) and batch.block is not None
        derived = {"reference_logp_K": np.zeros(len(batch.block.token_K))}
        back = service(tmp_path, passes=1, lag=2)
        await back.commit(0, 0, 0, True, derived, ["w1"])  # said again
        assert await back.get(0, 1, 0) == WEIGHTS  # older ones are due, by the lag
        await back.publish(Version(0, 0), ["w0"])
        lease = await back.lease(0)
        assert isinstance(lease, Lease) and lease.weights == ["w0"]

    asyncio.run(story())


def test_rollouts_that_undone_weights_make_after_the_roll_back_are_rolled_back_too(tmp_path):
    async def story() -> None:
        queue = service(tmp_path, round_groups=1, passes=1, lockstep=True)
        await queue.publish(Version(0, 0), ["w0"])
        (tmp_path / "cut").mkdir()
        await queue.cut(0, str(tmp_path / "cut"))
        await queue.written(0, str(tmp_path / "cut"))
        first = await queue.lease(0)
        await queue.put(first, answer(first, 2))
        await queue.get(0, 0, 0)
        await queue.commit(0, 0, 0, True, {}, ["w1"], "")
        late = await queue.lease(0, 0, first.id)
        assert late.version == Version(0, 1)
        assert await queue.roll_back(str(tmp_path / "cut"), False) == (1, 0)
        await queue.put(late, answer(late, 2))
        await queue.publish(Version(1, 0), ["w0"])
        await queue.get(1, 0, 0)
        await queue.commit(1, 0, 0, True, {}, ["w1"], "")
        again = await queue.lease(0, 0, late.id)
        assert [tuple(group) for group in again.groups] == [(late.groups[0].position, 1)]
        assert queue.queue.ledger.retired["rolled_back"] == 2 and queue.queue.ledger.balanced

    asyncio.run(story())


def test_a_lease_of_a_far_round_is_not_given_again_to_weights_that_a_roll_back_made_too_old(
    tmp_path,
):
    async def story() -> None:
        queue = service(tmp_path, round_groups=1, passes=2, max_age=3)
        await queue.publish(Version(0, 0), ["w0"])
        done = -1
        for number in range(12):
            while isinstance(lease := queue.queue.lease(0, 0, done), Lease):
                done = lease.id
                await queue.put(lease, answer(lease, 2))
            await queue.get(0, number, 0)
            await queue.commit(0, number, 0, True, {}, ["w"], "")
        far = queue.queue.lease(0, 0, done)  # … whose answer is lost: round 6 or later
        assert isinstance(far, Lease) and far.version.step == 12
        assert await queue.roll_back("", actors_died=False) == (1, 0)
        await queue.publish(Version(1, 0), ["w0"])
        again = queue.queue.lease(0, 0, done)
        assert again.groups != far.groups and again.groups[0].position < far.groups[0].position
        for number in range(40):
            while isinstance(again, Lease):
                await queue.put(again, answer(again, 2))
                again = queue.queue.lease(0, 0, again.id)
            batch = await queue.get(1, number, 0)
            assert batch.index.valid_M.all() and len(batch.index.valid_M) == 2
            await queue.commit(1, number, 0, True, {}, ["w"], "")
            again = queue.queue.lease(0, 0, -1)
        assert queue.queue.ledger.retired["expired"] == 0 and queue.queue.ledger.balanced

    asyncio.run(story())


def test_a_lease_whose_answer_was_lost_is_given_again_and_no_other(tmp_path):
    async def story() -> None:
        queue = service(tmp_path)
        await queue.publish(Version(0, 0), ["w0"])
        first = await queue.lease(0, 0, -1)
        again = await queue.lease(0, 0, -1)
        other_slot = await queue.lease(0, 1, -1)
        assert again.id == first.id and again.groups == first.groups
        assert other_slot.groups != first.groups
        following = await queue.lease(0, 0, first.id)
        assert following.groups not in (first.groups, other_slot.groups)

    asyncio.run(story())


def test_a_prompt_whose_actors_keep_dying_is_found_and_quarantined():
    queue = ReplayQueue(small(lease=4, round_groups=4, batch_groups=4), 1, Rules(1, 0.9, 1000, 3))
    queue.publish(Version(0, 0), ["w0"])
    deaths, quarantined = 0, []
    while not quarantined:
        lease = queue.lease(0)
        if any(group.position == 2 for group in lease.groups):
            deaths += 1
            quarantined = queue.release(0)[1]
        else:
            queue.put(lease, answer(lease, 2))
    assert (deaths, quarantined) == (3, [2])
    assert queue.ledger.retired["quarantined"] == 2
    for lease in iter(lambda: queue.lease(0), None):
        queue.put(lease, answer(lease, 2))
    assert [group.position for group in queue.line.groups] == [0, 1, 3, 4]
    assert queue.ledger.balanced


@pytest.mark.parametrize("damage", ["cut short", "bit flipped", "emptied"])
@pytest.mark.parametrize("what", ["log", "base"])
def test_a_damaged_journal_gives_what_was_before_the_damage(tmp_path, damage, what):
    async def story() -> None:
        play = Play(service(tmp_path), 3)
        await play.publish()
        await play.many(100)
        await cut(play, tmp_path / "cut")
        await play.many(200)
        journal = Journal(tmp_path / "journal")
        newest = journal.numbers()[-1]
        path = journal.log(newest) if what == "log" else journal.base(newest)
        data = bytearray(path.read_bytes())
        middle = len(data) // 2
        if damage == "bit flipped":
            data[middle] ^= 4
        path.unlink()  # the checkpoint has the base under another name
        path.write_bytes(data[: {"cut short": middle, "emptied": 0}.get(damage, len(data))])
        again = service(tmp_path).queue
        assert again.ledger.balanced and again.ledger.issued > 0
        live = play.queue.queue.committed
        assert again.committed == live if what == "base" else again.committed <= live

    asyncio.run(story())


def test_what_a_full_disk_kept_from_the_journal_is_lost_with_a_count(tmp_path):
    async def story() -> None:
        play = Play(service(tmp_path), 5)
        await play.publish()
        await play.many(100)
        await cut(play, tmp_path / "cut")
        play.queue.journal.broken = "no space left on device"
        before = play.queue.queue.line.next_position
        await play.many(300)
        lost = play.queue.queue.line.next_position - before
        lineage, _ = await play.queue.roll_back(str(tmp_path / "cut"), False)
        queue = play.queue.queue
        assert lost > 0 and queue.ledger.retired["lost"] == 2 * lost and queue.ledger.balanced
        assert set(positions_alive(queue).values()) == {1}
        play.lineage = lineage
        await play.publish()
        await play.many(600)
        assert play.queue.queue.committed > 40

    asyncio.run(story())


def test_a_checkpoints_state_that_is_damaged_is_named(tmp_path):
    async def story() -> None:
        play = Play(service(tmp_path), 1)
        await play.publish()
        await play.many(100)
        await cut(play, tmp_path / "cut")
        path = tmp_path / "cut" / STATE
        data = bytearray(path.read_bytes())
        data[-10] ^= 1
        path.unlink()
        path.write_bytes(data)
        with pytest.raises(DamagedError, match=STATE):
            read_base(path)

    asyncio.run(story())


def test_segments_that_no_recovery_reads_are_removed(tmp_path):
    async def story() -> None:
        play = Play(service(tmp_path), 2)
        await play.publish()
        batches = []
        for number in range(4):
            await play.many(120)
            batches.append(play.queue.queue.committed)
            await cut(play, tmp_path / f"cut{number}")
        await play.queue.covered(batches[2])
        assert len(Journal(tmp_path / "journal").numbers()) == 2
        assert same(state(service(tmp_path).queue), state(play.queue.queue))

    asyncio.run(story())
