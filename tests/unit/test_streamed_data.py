"""Preference sets larger than memory: streamed rows are those in memory, at every position."""

from pathlib import Path

import numpy as np
import pytest

from actors.dataset_engine import DatasetEngine, DatasetPrompts
from actors.engine import Request
from actors.rollout import GroupId
from cluster import inputs
from configs.schema import Config
from tests.harness import Local, settings
from tests.stages import write_rows

ROWS, BUFFER = 23, 4


def pairs(folder: Path, **last: object) -> str:
    """A file of pairs, the n-th of prompt n; every fifth row is tied and is left out."""
    rows = [
        {"prompt_ids": [n], "chosen_ids": [n, 70 + n % 9], "rejected_ids": [n, 20 + n % 7]}
        for n in range(ROWS)
    ]
    tied = [{**row, "rejected_ids": row["chosen_ids"]} for row in rows]
    every = [row for n in range(ROWS) for row in (tied[n], rows[n])[n % 5 != 4 :]]
    return write_rows(folder / "pairs.jsonl", [*every, *([last] if last else [])])


def offline(path: str, *overrides: str) -> Config:
    return settings(
        "offline_ipo", f"data.path={path}", "rollout.responses_per_prompt=2",
        "replay.samples_per_round=20", "learner.minibatch=10", "replay.inner_epochs=2",
        "learner.updates=24", f"data.buffer={BUFFER}", *overrides,
    )  # fmt: skip


def streamed(path: str, *overrides: str) -> Config:
    return offline(path, "data.streaming=true", *overrides)


def answers(config: Config, positions: list[int]) -> list[tuple[int, list[int]]]:
    """Row and tokens of the groups at these positions, read by an actor that has just started."""
    groups = inputs.offline_groups(config, config.data.path)
    engine, prompts = DatasetEngine(groups, 1.0), DatasetPrompts(groups)
    found = []
    for p in positions:
        block = engine.generate([Request(GroupId(p, 0), prompts[p])], "rollout")
        found.append((int(block.row_G[0]), [*block.prompt(0), *block.token_K]))
    return found


def test_streamed_groups_are_those_in_memory_at_every_position(tmp_path):
    path = pairs(tmp_path)
    positions = [*range(60), 47, 46, 24, 100, 3]
    assert answers(streamed(path), positions) == answers(offline(path), positions)


def test_an_actor_that_starts_anew_goes_on_at_any_position(tmp_path):
    path = pairs(tmp_path)
    whole = answers(streamed(path), list(range(60)))
    for position in (0, 9, 22, 23, 45, 59):
        assert answers(streamed(path), [position]) == [whole[position]]


def test_no_more_than_two_buffers_are_in_memory(tmp_path):
    groups = inputs.offline_groups(streamed(path := pairs(tmp_path)), path)
    most = 0
    for position in range(60):
        groups[position]
        most = max(most, sum(map(len, groups.kept.values())))
    assert most == 2 * BUFFER


def test_a_run_on_streamed_rows_is_one_on_rows_in_memory_bit_for_bit(tmp_path):
    path = pairs(tmp_path)
    found = []
    for config in (offline(path), streamed(path)):
        local = Local(config)
        groups = inputs.offline_groups(config, path)
        for actor in local.actors:
            actor.engine, actor.prompts = DatasetEngine(groups, 1.0), DatasetPrompts(groups)
        losses = [record.loss for record in local.steps(24)]
        found.append((losses, local.learner.weights().copy(), local.queue.ledger.reuse))
    assert found[0][0] == found[1][0] and np.array_equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2] and max(found[0][2]) > 2  # over more than one epoch


def test_the_check_before_a_run_reads_the_first_buffer_of_a_streamed_set(tmp_path):
    path = pairs(tmp_path, prompt_ids=[1], chosen_ids=[100], rejected_ids=[2])
    assert inputs.check(streamed(path)).rows[path].kept == BUFFER
    with pytest.raises(ValueError, match="token id 100, outside the vocabulary"):
        inputs.check(offline(path))
    row = {"prompt_ids": [1], "responses_ids": [[1], [2]], "rewards": [1, 2]}
    unlabelled = write_rows(tmp_path / "r.jsonl", [row])
    with pytest.raises(ValueError, match="row 1 has no labels, which objective.name=binary_feedme"):
        inputs.check(streamed(unlabelled, "objective.name=binary_feedme"))
