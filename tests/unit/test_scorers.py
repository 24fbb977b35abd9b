"""Every score has its scorer's identity: in the record, in its journal, in a run's directory."""

import json

import numpy as np
import pytest

from actors.actor import score
from actors.codec import block_from, block_tree, decode, encode
from actors.engine import Request
from actors.packing import pack
from actors.prompts import Prompt
from actors.rollout import REWARD_FAILED, GroupId, Rollouts, concatenate
from cluster import scorers
from configs.choices import RewardKind
from configs.schema import RewardConfig
from learner.describe import readable
from reward_server.rewards import InProcess, describe
from tests.harness import settings
from tests.rewards import save_model

PEAK, LENGTH = RewardConfig(), RewardConfig(kind=RewardKind.length)


def block(position: int, members: int = 2) -> Rollouts:
    prompt = Prompt(np.zeros(1, dtype=np.int32), 0)
    ones_N, zeros_N = np.ones(members, dtype=np.int64), np.zeros(members)
    request = Request(GroupId(position, 0), prompt)
    return pack([request], members, 1.0, ones_N, 70 * ones_N, zeros_N, zeros_N, zeros_N)


def whose(rollouts: Rollouts) -> list[str]:
    return [rollouts.scorer(n) for n in range(len(rollouts.reward_N))]


@pytest.fixture
def mixed() -> Rollouts:
    """One rollout scored with the data, three by a length, one that failed, one by a peak."""
    first, second, third = block(0), block(1), block(2)
    first.reward_N[0] = 0.5
    score(first, InProcess(LENGTH), 1.0)
    score(second, InProcess(LENGTH), 1.0)
    score(third, InProcess(PEAK), 1.0)
    third.fail(0, REWARD_FAILED, "it broke")
    return concatenate([first, second, third])


def test_each_rollout_says_whose_its_score_is_through_joining_cutting_and_the_journal(mixed):
    lengths, peak = describe(LENGTH), describe(PEAK)
    assert whose(mixed) == ["", lengths, lengths, lengths, "", peak]
    assert mixed.reward_N.tolist()[:4] == [0.5, -1, -1, -1] and mixed.reward_N[5] == 1
    assert whose(mixed.select(1, 3)) == [lengths, lengths, "", peak]
    assert whose(concatenate([mixed.select(2, 3), mixed.select(0, 1)])) == ["", peak, "", lengths]
    back = block_from(decode(encode(block_tree(mixed))))
    assert whose(back) == whose(mixed)


def test_a_sample_for_people_names_its_scorer(mixed):
    lines = [readable(mixed, group, 0) for group in range(3)]
    assert [line["scorer"] for line in lines] == [None, describe(LENGTH), None]
    json.dumps(lines)


def test_a_run_goes_on_with_the_same_files_only_unless_told_to(tmp_path):
    folder, run = save_model(tmp_path / "model"), tmp_path / "run"
    run.mkdir()
    given = ["reward.kind=model", f"reward.path={folder}", "gold.kind=peak"]
    scorers.keep(run, settings("bandit", *given))
    kept = scorers.kept(run)
    assert kept == {"reward": describe(settings("bandit", *given).reward), "gold": describe(PEAK)}
    scorers.keep(run, settings("bandit", *given))
    save_model(folder, seed=1)
    with pytest.raises(ValueError, match=r"reward\.path=.*files have changed: sha256=") as caught:
        scorers.keep(run, settings("bandit", *given))
    assert "\n" not in str(caught.value) and "resume=changed" in str(caught.value)
    assert kept["reward"][-17:-1] in str(caught.value) and scorers.kept(run) == kept
    scorers.keep(run, settings("bandit", *given, "resume=changed"))
    assert scorers.kept(run) != kept
