"""Preference pairs made with a reward: what is preferred, what is dropped, what is read again."""

import json

import numpy as np
import pytest

from actors.preferences import read
from cluster import inputs
from cluster.__main__ import main
from cluster.stages.label import label
from configs.load import prepare
from configs.schema import Config
from configs.schema_length import LengthDataConfig
from learner.stages import length_data


def shorter(prompts, responses):
    """−tokens before the end token (0) of the length problems."""
    return [-float(len([t for t in response if t])) for response in responses]


def broken(prompts, responses):
    raise RuntimeError("no reward today")


def constant(prompts, responses):
    return [1.0] * len(responses)


def rows_of(directory):
    return [json.loads(line) for line in (directory / "preferences.jsonl").read_text().splitlines()]


def reward(name):
    return ["reward.kind=function", f"reward.path={__name__}:{name}"]


def offline(path, *settings, by="shorter"):
    return prepare("offline_ipo", [f"data.path={path}", *reward(by), *settings])


@pytest.fixture
def ids(tmp_path):
    """Three groups of four responses of token ids, three of which are of equal length."""
    path = tmp_path / "ids.jsonl"
    groups = [[[1], [2, 3], [4, 5], [6, 7]]] * 3
    path.write_text("".join(
        json.dumps({"prompt_ids": [n], "responses_ids": group, "rewards": [0, 1, 2, 3]}) + "\n"
        for n, group in enumerate(groups)
    ))  # fmt: skip
    return path


@pytest.fixture(scope="module")
def length_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("length")
    data = LengthDataConfig(sft=20, pairs=30, prompts=10, longest=20, mode=8, context=64)
    length_data.write(folder, Config(length_data=data))
    return folder


def of_policy(folder, *settings):
    return prepare("bandit", [
        f"policy.path={folder / 'model'}", "prompts.source=jsonl", "prompts.count=0",
        f"prompts.path={folder / 'prompts.jsonl'}", "rollout.max_tokens=24", "data.prompts=12",
        "rollout.responses_per_prompt=4", "replay.samples_per_round=100", "learner.minibatch=100",
        *reward("shorter"), *settings,
    ])  # fmt: skip


# --- a data set's responses ------------------------------------------------------------------


def test_the_higher_reward_is_preferred_and_equal_ones_are_dropped_and_counted(ids, tmp_path):
    summary = label(offline(ids), tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert [(row["chosen_ids"], row["rejected_ids"]) for row in rows] == [([1], [2, 3])] * 3
    assert (summary["compared"], summary["ties"], summary["pairs"]) == (6, 3, 3)
    assert [row["chosen_reward"] for row in rows] == [-1.0] * 3
    assert summary["reward"] == {
        "mean": -1.75, "deviation": pytest.approx(np.sqrt(3) / 4), "min": -2.0, "max": -1.0,
        "chosen": -1.0, "rejected": -2.0,
    }  # fmt: skip
    assert summary["response_tokens"] == {"mean": 1.75, "chosen": 1.0, "rejected": 2.0}
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())


def test_all_pairs_of_a_group_are_compared_where_that_is_asked(ids, tmp_path):
    summary = label(offline(ids, "data.pairs=all"), tmp_path / "out")
    assert (summary["compared"], summary["ties"], summary["pairs"]) == (18, 9, 9)


def test_what_is_written_is_read_as_offline_data_with_its_rewards(ids, tmp_path):
    summary = label(offline(ids), tmp_path / "out")
    groups = read(summary["outputs"]["preferences"], 2)
    assert [group.rewards_C.tolist() for group in groups] == [[-1, -2]] * 3
    assert [group.labels_C.tolist() for group in groups] == [[1, 0]] * 3


def test_text_is_labelled_through_the_policys_tokenizer(length_folder, tmp_path):
    path = length_folder / "preferences_mode.jsonl"
    config = offline(
        path, f"policy.path={length_folder / 'model'}", "prompts.source=jsonl",
        f"prompts.path={length_folder / 'prompts.jsonl'}", "rollout.max_tokens=40",
        "prompts.count=0",
    )  # fmt: skip
    summary = label(config, tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    before = [json.loads(line) for line in path.read_text().splitlines()]
    for row, old in zip(rows, [row for row in before if differ(row)], strict=True):
        assert row["prompt"] == old["prompt"]
        assert {row["chosen"], row["rejected"]} == {old["chosen"], old["rejected"]}
        assert len(row["chosen"].split()) < len(row["rejected"].split())
        assert row["chosen_ids"][-1] == 0 and len(row["chosen_ids"]) == 1 - row["chosen_reward"]
    assert summary["ties"] + summary["pairs"] == summary["compared"] == 30
    assert summary["data"]["rows"] == 30


def differ(row):
    return len(row["chosen"].split()) != len(row["rejected"].split())


# --- a policy's responses --------------------------------------------------------------------


def test_responses_of_the_policy_are_sampled_scored_and_paired(length_folder, tmp_path):
    summary = label(of_policy(length_folder), tmp_path / "one")
    assert summary["responses"] == 48 and summary["compared"] == 24
    assert summary["source"] == "policy" and summary["data"] is None
    lines = (length_folder / "prompts.jsonl").read_text().splitlines()
    prompts = {json.loads(line)["prompt"] for line in lines}
    rows = rows_of(tmp_path / "one")
    assert rows and all(row["prompt"] in prompts for row in rows)
    assert all(row["chosen_reward"] > row["rejected_reward"] for row in rows)
    assert summary["response_tokens"]["chosen"] < summary["response_tokens"]["rejected"]


def test_equal_seeds_give_equal_pairs_and_others_do_not(length_folder, tmp_path):
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        label(of_policy(length_folder, f"seed={seed}"), tmp_path / name)
    files = [(tmp_path / n / "preferences.jsonl").read_text() for n in ("one", "again", "other")]
    assert files[0] == files[1] != files[2]


# --- directories and bad input ---------------------------------------------------------------


def test_a_finished_directory_is_left_as_it_is(ids, tmp_path):
    first = label(offline(ids), tmp_path / "out")
    written = (tmp_path / "out" / "preferences.jsonl").stat().st_mtime_ns
    ids.unlink()
    assert label(offline(ids), tmp_path / "out") == first
    assert (tmp_path / "out" / "preferences.jsonl").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    "by, settings, reason",
    [
        ("broken", [], "12 of 12 responses failed: the reward raised RuntimeError: no reward"),
        ("constant", [], "all 6 pairs have equal rewards"),
    ],
)
def test_rewards_that_label_nothing_are_one_clear_line(ids, tmp_path, by, settings, reason):
    with pytest.raises(ValueError) as caught:
        label(offline(ids, *settings, by=by), tmp_path / "out")
    assert str(caught.value).startswith(reason) and "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "summary.json").exists()


def test_one_response_to_a_prompt_makes_no_pair(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt_ids": [1], "responses_ids": [[2]]}\n')
    with pytest.raises(ValueError, match="set rollout.responses_per_prompt=2 or give data"):
        label(offline(path), tmp_path / "out")


def test_the_command_labels_under_a_name_of_its_own(ids, tmp_path, capsys):
    settings = [f"data.path={ids}", *reward("shorter"), f"run.dir={tmp_path}/runs"]
    assert main(["label", "offline_ipo", *settings]) == 0
    out = capsys.readouterr().out
    path = tmp_path / "runs" / "offline_ipo-label-1" / "preferences.jsonl"
    assert out.splitlines()[0].startswith("3 pairs of 6 by function(")
    assert out.splitlines()[-1] == f"pairs: {path}" and path.exists()
    assert main(["label", "offline_ipo", *settings, f"data.path={tmp_path}/none.jsonl"]) == 2
    assert "none.jsonl: cannot be read" in capsys.readouterr().err


def test_labelled_pairs_serve_a_run(length_folder, tmp_path):
    summary = label(of_policy(length_folder), tmp_path / "out")
    config = offline(
        summary["outputs"]["preferences"], f"policy.path={length_folder / 'model'}",
        "prompts.source=jsonl", f"prompts.path={length_folder / 'prompts.jsonl'}",
        "prompts.count=0", "rollout.max_tokens=24", "rollout.responses_per_prompt=2",
    )  # fmt: skip
    assert inputs.check(config).rows[config.data.path].kept == summary["pairs"]
