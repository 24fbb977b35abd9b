"""What the queue's files have lost is counted or named, and the rest comes back."""

import asyncio

import pytest

from actors.codec import DamagedError
from learner.replay.cuts import STATE
from learner.replay.journal import Journal, read_base
from tests.recovery import Play, cut, positions_alive, same, service, state


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
