"""Actors and ranks at a real queue over real connections: which way weights go."""

import asyncio
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest

from actors.low_rank import LowRank
from actors.rollout import Version
from learner.replay import clients
from learner.replay.clients import ActorQueue, LearnerQueue
from tests.queues import answer
from tests.recovery import service


class Reference:
    """In place of an object reference of Ray's."""


@pytest.fixture
def played(tmp_path, monkeypatch):
    """A round by an actor and a rank: what each version's weights were, and Ray's calls."""

    async def story(weights: list) -> tuple[list, list[str]]:
        queue, asked = service(tmp_path, passes=1), []
        address, loop = await queue.server.address("127.0.0.1"), asyncio.get_running_loop()
        monkeypatch.setattr(clients, "_address", lambda handle, seconds: address)

        def by_ray(name):
            def remote(*arguments):
                asked.append(name)
                return asyncio.run_coroutine_threadsafe(getattr(queue, name)(*arguments), loop)

            return SimpleNamespace(remote=remote)

        monkeypatch.setattr(clients.ray, "get", lambda call, timeout=None: call.result(timeout))
        calls = "publish", "commit", "weights"
        handle = SimpleNamespace(**{name: by_ray(name) for name in calls})
        actor, rank = ActorQueue(handle, 20), LearnerQueue(handle, 0, 20, deque(maxlen=2))

        def work() -> list:
            rank.publish(Version(0, 0), [weights[0], None])
            taken = []
            for number in range(2):
                for _ in range(3):
                    lease = actor.lease(0)
                    taken.append((lease.version.step, lease.weights[0]))
                    actor.put(lease, answer(lease, 2))
                batch = rank.get(0, number)
                made = Version(0, number + 1), [weights[number + 1], None]
                derived = {"reference_logp_K": np.zeros(len(batch.block.token_K))}
                rank.commit(batch, True, derived, made)
            rank.settle()
            for _ in range(2):  # the first may have been asked for with a put before that commit
                lease = actor.lease(0)
                taken.append((lease.version.step, lease.weights[0]))
                actor.put(lease, answer(lease, 2))
            actor.wire.close()
            rank.wire.close()
            return taken

        return await asyncio.to_thread(work), asked

    return lambda weights: asyncio.run(story(weights))


def test_small_weights_go_with_what_is_said_of_them_and_ray_is_not_asked(played):
    weights = [np.arange(5, dtype=np.float32) + step for step in range(3)]
    taken, asked = played(weights)
    assert {step for step, _ in taken} >= {0, 2}
    for step, found in taken:
        np.testing.assert_array_equal(found, weights[step])
    assert asked == ["publish"]  # the first, before there is a batch


def test_references_go_by_rays_calls_once_a_version(played):
    weights = [Reference() for _ in range(3)]
    taken, asked = played(weights)
    assert all(found is weights[step] for step, found in taken)
    versions = {step for step, _ in taken}
    assert max(versions) == 2 and asked.count("weights") == len(versions)
    assert asked.count("commit") == 2


def test_weights_are_an_array_whatever_stands_for_them(monkeypatch):
    flat = np.arange(6, dtype=np.float32)
    assert clients.received(flat, 1.0) is flat
    monkeypatch.setattr(clients.ray, "ObjectRef", Reference)
    monkeypatch.setattr(clients.ray, "get", lambda place, timeout: flat)
    assert clients.received(Reference(), 1.0) is flat
    relative = LowRank([Reference()], [], 1, 1.0, np.zeros(0, np.float32))
    np.testing.assert_array_equal(clients.received(relative, 1.0), flat)
