"""The bench of the queue in its smallest form: every field is there, and its books agree."""

import json

import pytest

from benchmarks import queue, results
from benchmarks.queue_other import Reverb
from cluster.__main__ import main
from configs.errors import ConfigError

SIZES = ["tokens=16", "producers=1", "lease=1", "turns=1", "seconds=0.1", "samples=256"]


def test_a_shrunk_bench_prints_its_tables_and_writes_every_field(
    ray_cluster, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert main(["bench", "queue", *SIZES, "held=1000", "reverb=false"]) == 0
    printed = capsys.readouterr().out
    for part in ("ours / list = ", "ours / asyncio = ", "within: ", "1,000 held: memory "):
        assert part in printed
    out = json.loads((tmp_path / "queue.json").read_text())
    assert out["environment"]["cpus"] and out["settings"]["turns"] == 1
    insert, sample = out["rows"]
    assert (insert["do"], sample["do"]) == ("insert", "sample")
    for side in ("ours", "list", "asyncio"):
        assert insert[side][0] > 0 and insert["cpu_us"][side][0] > 0
    assert set(insert["within_us"]) == {"lease", "put"}
    assert set(sample["within_us"]) == {"get", "commit"}
    assert min(sample["ours"] + sample["list"]) > 0
    (held,) = out["held"]
    assert min(held["insert"] + held["sample"]) > 0 and out["memory"]["rollouts"] > 0
    assert "reverb" not in insert


def test_without_reverb_one_line_says_so(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError("no such wheel")

    (tmp_path / "whole").touch()
    monkeypatch.setattr(queue.queue_other, "ENVIRONMENT", tmp_path)
    monkeypatch.setattr(Reverb, "__init__", refuse)
    assert queue.queue_other.reverb() is None
    assert capsys.readouterr().out == "NO REVERB: its side is left out: no such wheel\n"


@pytest.mark.parametrize("text", ["tokens=", "producers=0", "turns=0", "seconds=x", "reverb=maybe"])
def test_a_setting_that_cannot_be_used_is_one_line(text):
    with pytest.raises(ConfigError, match=f"{text}: cannot be used; set "):
        queue.parse([text])
