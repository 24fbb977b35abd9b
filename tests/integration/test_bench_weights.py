"""The bench of weight updates and generation in its smallest form: every field is there."""

import json

import pytest

from benchmarks import weights
from cluster.__main__ import main
from configs.errors import ConfigError

UPDATE = {
    "size", "parameters", "engine", "actors", "generating", "start_seconds", "clone_ms",
    "clone_all_ms", "update_ms", "update_all_ms", "first_ms", "ratio", "ratio_less_allowance",
    "share", "limit", "within", "in_flight", "parts_ms",
}  # fmt: skip
GENERATION = {"size", "engine", "actors", "rollouts_per_s", "tokens_per_s", "start_seconds"}


def test_a_shrunk_bench_prints_its_tables_and_writes_every_field(
    ray_cluster, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(weights, "TARGET", tmp_path / "weights.json")
    settings = ["sizes=1M", "engines=torch", "repeats=2", "actors=1", "seconds=0.1"]
    assert main(["bench", "weights", *settings]) == 0
    printed = capsys.readouterr().out
    for part in ("clone ms", "measure", "verdict", "hand_over", "rollouts/s", "is ready after"):
        assert part in printed
    out = json.loads((tmp_path / "weights.json").read_text())
    assert out["environment"]["cpus"] and out["settings"]["repeats"] == 2
    update, together = out["updates"]
    assert set(update) == set(together) == UPDATE
    assert (update["limit"], together["limit"]) == (1.0, 2.0)
    assert together["share"] == together["update_ms"] / update["update_ms"]
    assert (update["actors"], together["actors"]) == (1, 2)
    assert 0.9e6 < update["parameters"] < 1.1e6
    assert len(update["clone_all_ms"]) == len(update["update_all_ms"]) == 2
    assert set(update["parts_ms"]) == {"read", "put", "hand_over", "get", "copy"}
    assert sum(update["parts_ms"].values()) > 0 and min(update["update_all_ms"]) > 0
    (row,) = out["generation"]
    assert set(row) == GENERATION and row["actors"] == len(row["start_seconds"]) == 1
    assert row["tokens_per_s"] == pytest.approx(128 * row["rollouts_per_s"])


@pytest.mark.parametrize("size", weights.SIZES)
def test_sizes_are_what_they_are_called(size):
    shape = weights.configured(size, "vllm", []).policy.bandit
    assert shape.width == weights.HEAD * shape.heads
    millions = (12 * shape.layers * shape.width**2 + shape.vocabulary * shape.width) / 1e6
    assert millions == pytest.approx(float(size.rstrip("M")), rel=0.05)


@pytest.mark.parametrize("text", ["sizes=2M", "engines=", "repeats=0", "actors=0", "seconds=x"])
def test_a_setting_that_cannot_be_used_is_one_line(text):
    with pytest.raises(ConfigError, match=f"{text}: cannot be used; set "):
        weights.parse([text])
