"""Pushing to a group whose members die, stall and join: nothing waits, no half version counts."""

import threading
import time

import numpy as np
import pytest
import torch

from actors.rollout import Version
from learner.publisher import PushPublisher
from learner.transfer import Abandoned, TransferGroup
from tests.harness import Local, settings

SECONDS = 0.5


class FakeActor:
    def __init__(self) -> None:
        self.version = Version(-1, -1)
        self.weights: dict[str, torch.Tensor] = {}
        self.answers = True
        self.fault = ""  # at which point it misbehaves


class FakeLink:
    """Moves tensors between threads; an actor's fault stalls or kills the send."""

    def __init__(self, actors: dict[int, FakeActor]) -> None:
        self.actors = actors
        self.ended = threading.Event()
        self.raised: BaseException | None = None

    def send(self, version, weights) -> None:
        try:
            got = {}
            for name, tensor in weights:
                for actor in self.actors.values():
                    if actor.fault == "stalls":
                        self.ended.wait(60.0)
                    if actor.fault == "dies" or self.ended.is_set():
                        raise RuntimeError("an actor is gone")
                got[name] = tensor
            for actor in self.actors.values():
                actor.weights, actor.version = got, version
        except BaseException as error:
            self.raised = error
            raise

    def abandon(self) -> None:
        self.ended.set()


class FakeTransport:
    def __init__(self) -> None:
        self.links: list[FakeLink] = []

    def present(self, actors):
        return {index for index, actor in actors.items() if actor.answers}

    def connect(self, epoch, actors):
        if any(actor.fault == "cannot meet" for actor in actors.values()):
            raise ConnectionError("not met")
        if any(actor.fault == "is not met" for actor in actors.values()):
            time.sleep(2 * SECONDS)
        self.links.append(FakeLink(actors))
        return self.links[-1]


PARAMETERS = [(f"layer.{n}", torch.full((3,), float(n))) for n in range(5)]


def group_of(*actors: FakeActor) -> TransferGroup:
    group = TransferGroup(FakeTransport(), SECONDS)
    for index, actor in enumerate(actors):
        group.join(index, actor)
    return group


def push(group: TransferGroup, step: int) -> bool | None:
    sending = group.begin(Version(0, step))
    if sending is None:
        return None
    for name, tensor in PARAMETERS:
        sending.feed(name, tensor)
    return sending.end()


def test_all_members_have_the_version_and_all_of_its_weights():
    actors = FakeActor(), FakeActor()
    group = group_of(*actors)
    assert push(group, 1) and push(group, 2)
    for actor in actors:
        assert actor.version == Version(0, 2)
        assert [(n, t.tolist()) for n, t in actor.weights.items()] == [
            (n, t.tolist()) for n, t in PARAMETERS
        ]
    assert group.state.epoch == 1 and len(group.transport.links) == 1


@pytest.mark.parametrize("fault", ["dies", "stalls"])
def test_an_actor_that_fails_in_mid_send_ends_the_epoch_in_time_and_nobody_has_the_version(fault):
    good, bad = FakeActor(), FakeActor()
    group = group_of(good, bad)
    assert push(group, 1)
    bad.fault = fault
    started = time.monotonic()
    assert push(group, 2) is False
    assert time.monotonic() - started < 4 * SECONDS
    assert good.version == bad.version == Version(0, 1)
    assert group.transport.links[0].ended.is_set() and not group.state.linked
    bad.answers = False
    assert push(group, 3) and good.version == Version(0, 3) and group.state.epoch == 2
    assert bad.version == Version(0, 1)


def test_the_rest_of_a_failed_version_is_still_gathered_and_its_sender_ends():
    bad = FakeActor()
    bad.fault = "stalls"
    group = group_of(bad)
    sending = group.begin(Version(0, 1))
    for name, tensor in PARAMETERS * 20:  # more than any buffer would take
        sending.feed(name, tensor)
    assert sending.end() is False
    link = group.transport.links[0]
    until = time.monotonic() + 5.0
    while link.raised is None and time.monotonic() < until:
        time.sleep(0.01)
    assert isinstance(link.raised, RuntimeError | Abandoned)


@pytest.mark.parametrize("fault", ["cannot meet", "is not met"])
def test_a_group_that_cannot_be_built_in_time_sends_nothing_and_is_tried_anew(fault):
    actor = FakeActor()
    actor.fault = fault
    group = group_of(actor)
    started = time.monotonic()
    assert push(group, 1) is None
    assert time.monotonic() - started < 3 * SECONDS
    assert actor.version == Version(-1, -1) and group.failures == 1
    time.sleep(2 * SECONDS)
    assert all(link.ended.is_set() for link in group.transport.links), "a late link is abandoned"
    actor.fault = ""
    assert push(group, 2) and actor.version == Version(0, 2)


def test_an_actor_that_joins_during_a_send_is_in_from_the_next_one_on():
    first, second = FakeActor(), FakeActor()
    group = group_of(first)
    sending = group.begin(Version(0, 1))
    group.join(1, second)
    for name, tensor in PARAMETERS:
        sending.feed(name, tensor)
    assert sending.end()
    assert first.version == Version(0, 1) and second.version == Version(-1, -1)
    assert push(group, 2) and second.version == Version(0, 2)


def test_an_actor_that_leaves_is_not_sent_to():
    first, second = FakeActor(), FakeActor()
    group = group_of(first, second)
    assert push(group, 1)
    group.leave(1)
    assert push(group, 2)
    assert first.version == Version(0, 2) and second.version == Version(0, 1)


def test_a_fed_parameter_is_a_copy_so_that_the_optimizer_may_go_on():
    actor = FakeActor()
    group = group_of(actor)
    live = torch.ones(3)
    sending = group.begin(Version(0, 1))
    sending.feed("a", live)
    live.fill_(7.0)
    assert sending.end() and actor.weights["a"].tolist() == [1.0, 1.0, 1.0]


def test_a_link_that_takes_less_than_all_has_not_sent_the_version():
    class Lazy(FakeLink):
        def send(self, version, weights):
            next(weights)

    class LazyTransport(FakeTransport):
        def connect(self, epoch, actors):
            return Lazy(actors)

    group = TransferGroup(LazyTransport(), SECONDS)
    group.join(0, FakeActor())
    assert push(group, 1) is False


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_push_and_the_host_path_carry_the_same_weights_of_one_pass(zero_stage):
    config = settings("bandit_reinforce", "learner.updates=3", f"learner.zero_stage={zero_stage}")
    local, actor = Local(config), FakeActor()
    group = group_of(actor)
    publisher = PushPublisher(config, local.learner, 0, lambda flat: [flat], group)
    for record in local.steps(3):
        (flat,) = publisher.publish(push=True)
        assert actor.version == record.version
        pushed = np.concatenate([t.reshape(-1).numpy() for t in actor.weights.values()])
        assert np.array_equal(pushed, flat) and np.array_equal(flat, local.learner.weights())
    assert group.state.epoch == 1


def test_only_what_actors_are_to_have_is_pushed_and_once():
    config = settings("bandit_reinforce", "learner.updates=3")
    local, actor = Local(config), FakeActor()
    group = group_of(actor)
    publisher = PushPublisher(config, local.learner, 0, lambda flat: flat, group)
    publisher.publish(push=False)
    assert actor.version == Version(-1, -1)
    publisher.publish(push=True)
    actor.weights = {}
    publisher.publish(push=True)  # after a skipped step: the same version
    assert actor.version == Version(0, 0) and not actor.weights


def test_a_failed_push_leaves_the_host_path_as_it_is():
    config = settings("bandit_reinforce", "learner.updates=3")
    local, actor = Local(config), FakeActor()
    actor.fault = "dies"
    publisher = PushPublisher(config, local.learner, 0, lambda flat: flat, group_of(actor))
    flat = publisher.publish(push=True)
    assert np.array_equal(flat, local.learner.weights()) and actor.version == Version(-1, -1)


def test_other_ranks_gather_and_neither_push_nor_put():
    config = settings("bandit_reinforce", "learner.updates=3")
    local, actor = Local(config), FakeActor()
    publisher = PushPublisher(config, local.learner, 1, lambda flat: flat, group_of(actor))
    assert publisher.publish(push=True) is None and actor.version == Version(-1, -1)
