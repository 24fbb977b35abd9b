"""The bench of the reward service in its smallest form, on real Serve; what overload comes to."""

import json

import pytest

from benchmarks import results
from cluster.__main__ import main

pytestmark = pytest.mark.timeout(600)


def test_overload_is_shed_as_stated_failures_and_the_ledger_balances(
    ray_cluster, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    settings = ["repeats=1", "batches=1", "batch=16", "callers=2", "calls=3", "flood=800"]
    assert main(["bench", "reward", *settings]) == 0
    printed = capsys.readouterr().out
    for words in ("reward: service / direct", "added latency", "ledger at the end"):
        assert words in printed
    out = json.loads((tmp_path / "reward.json").read_text())
    (row,), (wait,) = out["efficiency"], out["latency"]
    assert row["ratio"] == pytest.approx(row["service_per_s"] / row["direct_per_s"])
    assert wait["served_ms"] > wait["direct_ms"] > 0
    height, end = out["overload"]["at_0.5_s"], out["overload"]["at_the_end"]
    assert height["issued"] == end["issued"] == 8000 and height["in_flight"] > 0
    shed = end["retired"]["reward_failed"]
    assert 0 < shed < 8000 and end["in_flight"] == 0 and end["queued"] == 8000 - shed
    assert any("reward service" in words for words in out["overload"]["failures_say"])
    assert out["overload"]["alive_after"]


def test_a_setting_that_is_not_known_is_one_line(capsys):
    assert main(["bench", "reward", "seed=1"]) == 2
    assert "the settings are repeats" in capsys.readouterr().err
