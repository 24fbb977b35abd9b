"""The queue outlives its process, and a learner that goes back in time takes its books with it."""

import asyncio

import numpy as np
import pytest

from actors.actor import Lease
from actors.rollout import Version
from learner.replay.clients import WEIGHTS
from learner.replay.records import Batch
from tests.queues import answer
from tests.recovery import Play, cut, positions_alive, same, service, state


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
