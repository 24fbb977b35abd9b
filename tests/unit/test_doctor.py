"""The doctor as a command: what it prints and returns, whatever its checks find or run into."""

import sys

from cluster.__main__ import main
from cluster.doctor import doctor
from tests import examined

plain_environment, config = examined.plain_environment, examined.config


def test_a_check_that_breaks_is_a_warning_in_one_line(config, monkeypatch):
    def broken(config):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(doctor, "CHECKS", {"broken": broken})
    (finding,) = doctor.examine(config)
    assert finding[:3] == ("broken", "warning", "not known: RuntimeError: first second")


def test_the_command_prints_a_line_each_and_its_status_counts(monkeypatch, capsys):
    answers = {"fine": ("ok", "all", ""), "less so": ("warning", "little", "more")}
    monkeypatch.setattr(doctor, "CHECKS", {n: lambda c, a=a: a for n, a in answers.items()})
    assert main(["doctor"]) == 0
    monkeypatch.setitem(doctor.CHECKS, "bad", lambda c: ("problem", "none", "get one"))
    assert main(["doctor", "bandit_vllm", "reward.port=8123"]) == 1
    out = capsys.readouterr().out
    assert out.endswith(
        "ok       settings  bandit_vllm reward.port=8123\n"
        "ok       fine      all\n"
        "warning  less so   little\n"
        "                   fix: more\n"
        "problem  bad       none\n"
        "                   fix: get one\n"
        "1 problem, 1 warning\n"
    )


def test_colour_only_where_asked_for():
    bad = [doctor.Finding("bad", "problem", "none", "get one")]
    assert doctor.report(bad, colour=True).startswith("\033[31mproblem \033[0m bad  none\n")
    assert "\033" not in doctor.report(bad)


def test_settings_that_make_no_run_are_bad_input(capsys):
    assert main(["doctor", "bandti"]) == 2
    assert "no such preset" in capsys.readouterr().err


def test_without_omegaconf_the_defaults_are_examined(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "configs.load", None)
    monkeypatch.setattr(doctor, "CHECKS", {})
    assert main(["doctor"]) == 1
    assert "defaults, not bandit" in capsys.readouterr().out


def test_every_check_answers_on_this_machine(config):
    findings = list(doctor.examine(config))
    assert [f.name for f in findings] == list(doctor.CHECKS)
    assert not [f for f in findings if f.found.startswith("not known")]
    assert all(bool(f.fix) == (f.status != "ok") for f in findings)
