"""The command line: every command is found, and says what is wrong in one line."""

import json

import pytest

from cluster.__main__ import main


def test_report_writes_the_page_of_a_run(tmp_path, capsys):
    line = {"step": 1, "batch": 0, "round": 0, "loss": 1.0, "cells": []}
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_report_of_no_run_is_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


COMMANDS = [
    "train", "sft", "reward-model", "label", "pipeline", "evaluate", "study", "report", "bench",
    "advise", "doctor", "dashboard",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0 and "usage:" in capsys.readouterr().out
