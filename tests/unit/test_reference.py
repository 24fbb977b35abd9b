"""π_ref's log-probabilities are the same whoever computes them, and are asked for once."""

import threading

import pytest
import torch

from learner import reference as module
from learner.batch import pad
from learner.reference import REFERENCE, Reference
from tests.harness import settings
from tests.varying import network, rollouts, settings_for

PIPELINED = ["replay.schedule=pipelined", "replay.inner_epochs=1"]


@pytest.fixture
def threads(monkeypatch) -> list[str]:
    """The threads in which π_ref's network was asked, one entry a forward pass."""
    seen: list[str] = []
    asked = module.response_logps

    def noted(*given):
        seen.append(threading.current_thread().name)
        return asked(*given)

    monkeypatch.setattr(module, "response_logps", noted)
    return seen


def of(folder, *overrides: str) -> Reference:
    config = settings("bandit_dpo", *settings_for(folder, "gpt_neox"), *overrides)
    return Reference(config, network("gpt_neox"), torch.device("cpu"))


def test_pipelined_a_thread_of_its_own_begins_and_in_lockstep_nothing_does(tmp_path, threads):
    expected = of(tmp_path).logps(pad(rollouts()))
    assert threads == ["MainThread"]
    beside, parts = of(tmp_path, *PIPELINED), [pad(rollouts()), None, pad(rollouts(groups=2))]
    beside.begin(parts)
    assert torch.equal(beside.logps(parts[0]), expected)
    beside.logps(parts[2])
    assert threads[1:] == ["reference_0", "reference_0"]


@pytest.mark.parametrize("setting", ["learner.lora.rank=2", "cluster.threads=2"])
def test_nothing_is_beside_a_shared_network_or_a_policy_of_more_threads(tmp_path, threads, setting):
    reference, part = of(tmp_path, *PIPELINED, setting), pad(rollouts())
    reference.begin([part])
    reference.logps(part)
    assert threads == ["MainThread"]


@pytest.mark.parametrize("overrides", [[], PIPELINED])
def test_what_a_part_has_is_not_computed_again(tmp_path, threads, overrides):
    reference, part = of(tmp_path, *overrides), pad(rollouts())
    reference.begin([part])
    first = reference.logps(part)
    reference.begin([part])
    assert reference.logps(part) is first is part.derived_NL[REFERENCE]
    assert len(threads) == 1


def test_an_error_beside_is_raised_where_the_numbers_are_wanted(tmp_path, monkeypatch):
    def fails(*given):
        raise FloatingPointError("for the test")

    monkeypatch.setattr(module, "response_logps", fails)
    reference, part = of(tmp_path, *PIPELINED), pad(rollouts())
    reference.begin([part])
    with pytest.raises(FloatingPointError, match="for the test"):
        reference.logps(part)
