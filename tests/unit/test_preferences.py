"""Offline rollouts: files round-trip, unknown stays unknown, bad rows are named."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.preferences import (
    OfflineGroup,
    PreferenceError,
    from_rollouts,
    read,
    to_rollouts,
    write_parquet,
)
from actors.rollout import OFFLINE_STEP, REWARD_FAILED, UNLABELLED, VALID

IDS = st.lists(st.integers(0, 99), min_size=1, max_size=5)


def jsonl(tmp_path, *rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def pair(**changes):
    return {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4], **changes}


def scored(**changes):
    return {"prompt_ids": [1], "responses_ids": [[2, 3], [4], [5]], **changes}


@st.composite
def groups(draw):
    members = draw(st.integers(1, 4))
    return draw(st.lists(group(members), min_size=1, max_size=4))


@st.composite
def group(draw, members):
    responses = [draw(IDS) for _ in range(members)]
    number = st.floats(-1e6, 1e6, width=32) | st.just(float("nan"))
    logps = [[draw(st.floats(-50, 0, width=32)) for _ in ids] for ids in responses]
    known = draw(st.booleans())
    return OfflineGroup(
        prompt_ids=np.array(draw(IDS), np.int32),
        responses=tuple(np.array(ids, np.int32) for ids in responses),
        rewards_C=np.array([draw(number) for _ in responses], np.float32),
        labels_C=np.array([draw(st.sampled_from([1, 0, -1])) for _ in responses], np.int8),
        logps=tuple(np.array(logp, np.float32) for logp in logps) if known else None,
    )


def assert_same(one, other):
    np.testing.assert_array_equal(one.prompt_ids, other.prompt_ids)
    np.testing.assert_array_equal(one.rewards_C, other.rewards_C)
    np.testing.assert_array_equal(one.labels_C, other.labels_C)
    assert (one.logps is None) == (other.logps is None)
    for name in ("responses", "logps"):
        for mine, theirs in zip(getattr(one, name) or (), getattr(other, name) or (), strict=True):
            np.testing.assert_array_equal(mine, theirs)
            assert mine.dtype == theirs.dtype


# --- reading, writing, packing ---------------------------------------------------------------


def test_a_pair_is_a_labelled_group_of_two_without_reward(tmp_path):
    (found,) = read(jsonl(tmp_path, pair()))
    assert [ids.tolist() for ids in found.responses] == [[2, 3], [4]]
    assert found.labels_C.tolist() == [1, 0]
    assert np.isnan(found.rewards_C).all() and found.logps is None


def test_what_a_row_leaves_out_stays_unknown(tmp_path):
    rows = [scored(), scored(rewards=[0.5, None, 0], labels=[1, None, False])]
    first, second = read(jsonl(tmp_path, *rows))
    assert np.isnan(first.rewards_C).all() and (first.labels_C == UNLABELLED).all()
    np.testing.assert_array_equal(second.rewards_C, [0.5, np.nan, 0])
    assert second.labels_C.tolist() == [1, UNLABELLED, 0]


@settings(max_examples=40, deadline=None)
@given(groups())
def test_written_groups_read_back_the_same(tmp_path_factory, written):
    path = str(tmp_path_factory.getbasetemp() / "groups.parquet")
    write_parquet(path, written)
    for one, other in zip(written, read(path), strict=True):
        assert_same(one, other)


@settings(max_examples=40, deadline=None)
@given(groups())
def test_packed_groups_unpack_the_same(packed):
    count = len(packed)
    block = to_rollouts(packed, range(5, 5 + count), [0] * count, range(count), temperature=0.7)
    for one, other in zip(packed, from_rollouts(block), strict=True):
        assert_same(one, other)


def test_offline_rollouts_have_no_version_and_keep_their_row(tmp_path):
    found = read(jsonl(tmp_path, pair(), pair(chosen_ids=[9])))
    block = to_rollouts(found, positions=[7, 8], incarnations=[0, 1], rows=[1, 0], temperature=0.5)
    assert (block.members, block.groups, block.temperature) == (2, 2, 0.5)
    assert block.ids() == [(7, 0), (8, 1)] and block.row_G.tolist() == [1, 0]
    assert (block.step_K == OFFLINE_STEP).all() and (block.lineage_K == 0).all()
    assert (block.oldest_step_N() == OFFLINE_STEP).all() and (block.status_N == VALID).all()
    assert np.isnan(block.logp_K).all() and np.isnan(block.reward_N).all()
    assert block.response(2).tolist() == [9] and block.prompt(1).tolist() == [1]


def test_a_block_with_failures_is_not_offline_data(tmp_path):
    block = to_rollouts(read(jsonl(tmp_path, pair())), [0], [0], [0])
    block.fail(1, REWARD_FAILED, "broke")
    with pytest.raises(ValueError, match="failed"):
        from_rollouts(block)


def test_groups_of_different_sizes_do_not_pack(tmp_path):
    (two,), (three,) = read(jsonl(tmp_path, pair())), read(jsonl(tmp_path, scored()))
    with pytest.raises(ValueError, match="one size"):
        to_rollouts([two, three], [0, 1], [0, 0], [0, 1])


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    found = read(jsonl(tmp_path, pair()))
    with pytest.raises(PreferenceError, match="cannot be written"):
        write_parquet(str(tmp_path / "missing" / "data.parquet"), found)
    assert [p.name for p in tmp_path.iterdir()] == ["data.jsonl"]


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad, reason",
    [
        ("{", "malformed JSON"),
        ({"prompt_ids": [1]}, "no responses"),
        ({"chosen_ids": [1], "rejected_ids": [2]}, "no column 'prompt_ids'"),
        ({"prompt_ids": [1], "chosen_ids": [2]}, "no column 'rejected_ids'"),
        (pair(rejected_ids=None), "column 'rejected_ids' is null"),
        (pair(rejected_ids=[]), "rejected_ids has no tokens"),
        (pair(chosen_ids=[200]), "token id 200"),
        (pair(responses_ids=[[1], [2]]), "both responses_ids and chosen_ids"),
        (pair(chosen_ids=[2] * 9), "response of 9 tokens is over the limit of 8"),
        (pair(prompt_ids=[2] * 5), "prompt of 5 tokens is over the limit of 4"),
        (scored(), "3 responses where every row needs 2"),
        ({"prompt_ids": [1], "responses_ids": []}, "responses_ids is empty"),
        ({"prompt_ids": [1], "responses_ids": 3}, "responses_ids must be a list"),
        ({"prompt_ids": [1], "responses_ids": [[1], []]}, "responses_ids[1] has no tokens"),
        (scored(rewards=[1]), "1 rewards for 3 responses"),
        (scored(rewards=3), "rewards must be a list"),
        (scored(rewards=["1", 2, 3]), "reward '1' is not a finite number"),
        (scored(rewards=[float("nan"), 2, 3]), "null is an unknown one"),
        (scored(rewards=[10**400, 2, 3]), "is not a finite number"),
        (scored(labels=[2, 0, 0]), "label 2 is none of"),
        (scored(logps=[[-1], [-1], [-1]]), "1 logps for a response of 2 tokens"),
        (scored(logps=[[-1, 1], [-1], [-1]]), "at most 0"),
        (scored(logps=[[-1, None], [-1], [-1]]), "finite numbers"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_reason(tmp_path, bad, reason):
    path = jsonl(tmp_path, pair(), bad)
    with pytest.raises(PreferenceError) as caught:
        read(path, vocabulary=100, max_prompt=4, max_response=8)
    assert str(caught.value).startswith(f"{path}: line 2: ") and reason in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < len(path) + 400


def test_every_row_needs_c_responses(tmp_path):
    path = jsonl(tmp_path, pair())
    with pytest.raises(PreferenceError, match="line 1: 2 responses where every row needs 10"):
        read(path, members=10)


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
def test_an_empty_or_missing_file_is_one_clear_line(tmp_path, name):
    with pytest.raises(PreferenceError, match="cannot be read"):
        read(str(tmp_path / name))
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(PreferenceError) as caught:
        read(str(tmp_path / name))
    assert len(str(caught.value).splitlines()) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 120) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("prompt_ids", "chosen_ids", "rejected_ids", "responses_ids", "rewards", "labels", "logps")


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON | st.lists(IDS)))
def test_any_row_is_a_group_or_one_clear_line(tmp_path_factory, row):
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    path.write_text(json.dumps(row))
    try:
        (found,) = read(str(path), vocabulary=100)
        to_rollouts([found], [0], [0], [0])
    except PreferenceError as error:
        assert len(str(error).splitlines()) == 1
