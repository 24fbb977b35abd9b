"""The number of rollout actors asked for in mid-run: what is refused, and what the queue does."""

import asyncio
import json
import threading
from pathlib import Path

import pytest

from actors.rollout import Version
from cluster.__main__ import main
from cluster.scale import ASKED, DONE, actors, ask, obey
from configs.load import to_yaml
from learner.replay.service import QueueService
from tests.harness import settings
from tests.recovery import service


class Fleet:
    def __init__(self) -> None:
        self.asked: list[int] = []

    def scale(self, actors: int) -> str:
        self.asked.append(actors)
        return f"{actors} now"


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "config.yaml").write_text(to_yaml(settings("bandit")))
    return tmp_path


def drive(run: Path, fleet: Fleet, said: list[str]) -> threading.Thread:
    """A driver that looks until it was asked for something."""

    def look() -> None:
        while not fleet.asked and not said:
            obey(run, settings("bandit"), fleet, said.append)

    driver = threading.Thread(target=look, daemon=True)
    driver.start()
    return driver


def test_the_driver_takes_what_was_asked_for_once_and_says_what_it_did(run):
    fleet, said = Fleet(), []
    driver = drive(run, fleet, said)
    assert ask(run, 3, seconds=10.0) == "3 now"
    driver.join()
    obey(run, settings("bandit"), fleet, said.append)
    assert fleet.asked == [3] and said == ["3 now"]


def test_a_resumed_run_starts_with_what_was_last_asked_for(run):
    config = settings("bandit", "rollout.actors=2")
    assert actors(run, config) == 2
    (run / ASKED).write_text('{"actors": 5, "asked": 1}')
    obey(run, config, Fleet(), print)
    assert actors(run, config) == 5 and config.rollout.actors == 2


@pytest.mark.parametrize("number", ["0", "-1"])
def test_no_number_of_actors_is_refused_in_one_line(run, capsys, number):
    assert main(["scale", str(run), "--actors", number]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "rollout.actors" in error and not (run / ASKED).exists()


def test_what_is_no_run_and_what_is_over_are_refused(run, tmp_path_factory):
    with pytest.raises(ValueError, match="no run's directory"):
        ask(tmp_path_factory.mktemp("empty"), 2)
    (run / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="is over"):
        ask(run, 2)


def test_where_nobody_answers_nothing_is_left_behind(run):
    with pytest.raises(ValueError, match="no driver took it"):
        ask(run, 2, seconds=0.2)
    assert not (run / ASKED).exists() and not (run / DONE).exists()


@pytest.mark.parametrize("content", ["{", "[3]", '{"actors": "3"}', '{"actors": true}',
                                     '{"actors": 0}', json.dumps({"actors": 10**30})])  # fmt: skip
def test_a_file_that_says_something_else_changes_nothing_and_is_taken_away(run, content):
    fleet, said = Fleet(), []
    (run / ASKED).write_text(content)
    obey(run, settings("bandit"), fleet, said.append)
    assert fleet.asked == [] and len(said) == 1 and said[0].startswith("not scaled")
    assert not (run / ASKED).exists()


def test_an_actor_that_goes_gets_no_lease_and_what_it_held_is_issued_again(tmp_path):
    async def story(queue: QueueService) -> None:
        await queue.publish(Version(0, 0), ["w"])
        first = await queue.lease(0)
        held = await queue.lease(1)
        assert held.groups != first.groups
        assert await queue.expect([0]) == 1
        assert await queue.lease(1) == "over"
        again = await queue.lease(0, 1)
        assert again.groups == held.groups and again.id != held.id
        assert queue.queue.ledger.balanced and not queue.queue.line.attempts
        assert await queue.expect([0, 1]) == 0
        assert await queue.lease(1) != "over"

    asyncio.run(story(service(tmp_path)))


def test_a_lease_that_a_dead_actor_still_waits_for_goes_to_nobody(tmp_path):
    async def story(queue: QueueService) -> None:
        waiting = asyncio.ensure_future(queue.lease(1))  # before there are weights
        await asyncio.sleep(0)
        await queue.expect([0])
        await queue.publish(Version(0, 0), ["w"])
        assert await waiting == "over"
        assert queue.queue.ledger.counts()["issued"] == 0

    asyncio.run(story(service(tmp_path)))
