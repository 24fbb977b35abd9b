"""Studies as files: what a file may say, and that ours can be run."""

from pathlib import Path

import pytest

from cluster.study.search import combination
from cluster.study.search import search as find_rates
from cluster.study.spec import STUDIES, load
from cluster.study.trial import Outcome, Trial, _digest
from configs.errors import ConfigError
from configs.load import prepare
from configs.schema import Config

SMALL = """
title: Small
preset: bandit
axes: {T: {"1": [replay.inner_epochs=1], "2": [replay.inner_epochs=2]}, reward: {R1: []}}
"""


def study(tmp_path: Path, text: str):
    path = tmp_path / "small.yaml"
    path.write_text(text)
    return load(str(path))


@pytest.mark.parametrize("name", sorted(path.stem for path in STUDIES.glob("*.yaml")))
@pytest.mark.parametrize("quick", [False, True])
def test_every_study_of_ours_has_cells_that_can_run(name, quick):
    found = load(name, quick)
    assert found.cells and found.claims and found.figures and found.source
    assert not quick or found.seeds <= 2
    assert quick or found.search or not found.preset.startswith("bandit")


def test_cells_are_the_product_of_the_axes_less_what_is_left_out(tmp_path):
    found = study(tmp_path, SMALL + 'skip: [{T: "2"}]\n')
    assert found.cells == [{"T": "1", "reward": "R1"}]
    assert found.settings_of(found.cells[0]) == ["replay.inner_epochs=1"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("search: {score: odd}", "search.score=odd"),
        ("settings: [replay.samples_per_round=105]", "cell T 1, reward R1"),
        ("settings: [learner.updates=0]", "cell T 1, reward R1"),
        ("seeds: 0", "seeds=0"),
        ("seeds: many", "is no int"),
        ("figures: [{kind: pie, y: ess, lines: T}]", "figures.kind=pie"),
        ("figures: [{kind: curves, y: ess, lines: U}]", "figures.lines=U"),
        ("figures: [{kind: curves, lines: T}]", "'y'"),
        ("claims: [{name: a, section: b, says: c, test: odd}]", "claims.test=odd"),
        (
            "claims: [{name: a, section: b, says: c, test: similar, more: {T: '3'}, less: {T: 2}}]",
            "axes.T=3",
        ),
        ("claims: [{name: a, section: b, says: c, test: greater}]", "claims.more="),
        ("claims: [{name: a, section: b, says: c, test: rising}]", "claims.along="),
        ("skip: [{T: '1'}, {T: '2'}]", "no cell is left"),
        ("search: {per: [lr]}", "search.per=lr"),
        ("axis: {}", "axis"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused_by_name_before_its_first_trial(tmp_path, more, says):
    with pytest.raises(ConfigError) as refused:
        study(tmp_path, SMALL + more + "\n")
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_an_unknown_study_is_answered_with_those_there_are():
    with pytest.raises(ConfigError, match="figure4"):
        load("figure5")


def test_a_trial_is_named_by_its_settings_so_that_equal_ones_are_one_run(tmp_path):
    found = study(tmp_path, SMALL)
    cell = found.cells[0]
    name = Trial(cell, 0, 1e-3).config(found, tmp_path).run.name
    assert name == Trial(cell, 0, 1e-3).config(found, tmp_path / "other").run.name
    assert name != Trial(cell, 1, 1e-3).config(found, tmp_path).run.name
    assert name != Trial(cell, 0, 1e-2).config(found, tmp_path).run.name
    assert name.startswith("1-R1-0-")


def test_a_trial_reads_the_stages_that_all_trials_share(tmp_path):
    found = load("length_min")
    config = Trial(found.cells[0], 0).config(found, tmp_path / "trials", tmp_path)
    assert config.policy.path == f"{tmp_path}/length/sft/hf"
    assert config.run.dir == f"{tmp_path}/trials"
    elsewhere = Trial(found.cells[0], 0).config(found, tmp_path / "trials", tmp_path / "other")
    assert elsewhere.run.name == config.run.name


class Scored:
    """Trials whose reward is best at 3e-3, and better the longer they run; 0.3 fails."""

    def __init__(self) -> None:
        self.asked: list[Trial] = []

    def run(self, trials: list[Trial], what: str) -> list[Outcome]:
        self.asked += trials
        return [self._outcome(trial) for trial in trials]

    def _outcome(self, trial: Trial) -> Outcome:
        assert trial.rate is not None
        reward = trial.updates / 1000 - abs(trial.rate - 3e-3)
        failure = "diverged" if trial.rate == 0.3 else ""
        return Outcome(trial, Path(), trial.rate, [{"step": 1, "reward_eval": reward}], failure)


def test_halving_runs_the_better_half_twice_as_long_and_finds_the_best_rate(tmp_path):
    found = study(tmp_path, SMALL + "search: {per: [T], updates: 160}\n")
    trials = Scored()
    rates, rows = find_rates(found, trials)
    assert rates == {"T 1": 3e-3, "T 2": 3e-3}
    spent = {u: sum(t.updates == u for t in trials.asked) for u in (40, 80, 160)}
    assert spent == {40: 20, 80: 10, 160: 6}
    assert len(rows) == 36 and sum(row["score"] is None for row in rows) == 2
    assert combination(found, found.cells[1]) == "T 2"
    assert {t.seed for t in trials.asked} == {1000}  # never a seed of the results


def test_a_search_for_speed_takes_the_rate_whose_mean_is_the_highest(tmp_path):
    text = SMALL + "search: {rates: [0.001, 0.1], rungs: 1, score: mean}\n"
    curves = {0.001: [0.2, 0.6, 1.0], 0.1: [0.9, 1.0, 0.99]}

    class Written(Scored):
        def run(self, trials: list[Trial], what: str) -> list[Outcome]:
            return [outcome(trial) for trial in trials]

    def outcome(trial: Trial) -> Outcome:
        curve = [0.0, *curves[trial.rate or 0.0]]  # the first is before training
        rows = [{"step": step, "reward_eval": value} for step, value in enumerate(curve)]
        return Outcome(trial, Path(), trial.rate or 0.0, rows)

    rates, rows = find_rates(study(tmp_path, text), Written())
    assert rates == {"all": 0.1}
    assert [row["score"] for row in rows] == pytest.approx([0.6, 2.89 / 3])


def test_a_combination_without_any_working_rate_is_named(tmp_path):
    found = study(tmp_path, SMALL + "search: {rates: [0.3]}\n")
    with pytest.raises(RuntimeError, match="no learning rate works for all"):
        find_rates(found, Scored())


def test_a_trials_name_is_of_what_differs_from_the_schema_so_that_new_settings_keep_old_trials():
    usual, more = prepare("bandit", []), prepare("bandit", ["eval.every=20"])
    assert more.eval.every == Config().eval.every and _digest(usual) == _digest(more)
    other = prepare("bandit", ["eval.every=21"])
    assert _digest(other) != _digest(usual)
    del usual.cluster.gpu_gib  # as before there was such a setting: the class's default stands
    assert _digest(usual) == _digest(more)
