"""Studies through the real system: trials in reused processes, kept, compared, decided."""

import contextlib
import json
import os
import shutil
import subprocess
import textwrap
from pathlib import Path

import pandas as pd
import pytest

from cluster.study.study import study
from configs.errors import ConfigError

pytestmark = pytest.mark.timeout(900)
SAME = ["step", "reward_eval", "reward_mean", "kl_to_generator", "eval_kl_to_reference", "ess"]


@pytest.fixture
def small(tmp_path: Path) -> str:
    """Three cells; the reward of the last one scores nothing."""
    path = tmp_path / "small.yaml"
    path.write_text(
        textwrap.dedent("""
        title: Small
        preset: bandit_best_of_n
        settings: [learner.updates=20, eval.every=10, replay.inner_epochs=1]
        axes:
          reward:
            R1: [reward.centre=70]
            R2: [reward.centre=20]
            none: [reward.kind=function, "reward.path=tests.integration.no_reward:score"]
        seeds: 1
        figures: [{kind: curves, y: reward_eval, lines: reward}]
        claims:
          - name: R2 is nearer
            section: "4"
            says: The reference policy scores higher on R2.
            test: greater
            more: {reward: R2}
            less: {reward: R1}
    """)
    )
    return str(path)


def curves(folder: Path) -> pd.DataFrame:
    table = pd.read_parquet(folder / "results.parquet")
    good = table[table.status == "finished"].sort_values(["reward", "seed", "step"])
    return good[["reward", "seed", *SAME]].reset_index(drop=True)


def test_a_study_keeps_finished_trials_names_failed_ones_and_repeats_itself(
    tmp_path, small, ray_cluster, capfd
):
    first = study(small, tmp_path / "two", parallel=2)
    table = pd.read_parquet(first / "results.parquet")
    assert set(table[table.status == "finished"].reward) == {"R1", "R2"}
    failed = table[table.status == "failed"]
    assert list(failed.reward) == ["none"] and "TooManyFailures" in failed.failure.iloc[0]
    told = capfd.readouterr().err
    assert "reward none, seed 0: FAILED" in told and "min left" in told
    page = (first / "page.html").read_text()
    assert "none" in page and "R2 is nearer" in page
    (claim,) = json.loads((first / "claims.json").read_text())
    assert claim["verdict"] == "undecided"  # one seed
    assert (first / "figure.png").stat().st_size > 10_000
    with pytest.raises(ConfigError, match="--resume"):
        study(small, tmp_path / "two")
    before = curves(first)
    shutil.rmtree(first / "trials")  # what trials.parquet has is enough
    study(small, tmp_path / "two", resume=True, parallel=1)
    assert "2 of 3 trials are there already" in capfd.readouterr().err
    assert not list(first.glob("trials/R*"))
    pd.testing.assert_frame_equal(curves(first), before)
    again = study(small, tmp_path / "one", parallel=1)
    pd.testing.assert_frame_equal(curves(first), curves(again))


def test_a_quick_study_of_the_paper_ends_with_its_figure_and_verdicts(tmp_path, ray_cluster):
    folder = study("figure19", tmp_path, quick=True, seeds=1)
    table = pd.read_parquet(folder / "results.parquet")
    assert set(table.status) == {"finished"} and table.trial.nunique() == 6
    assert len(json.loads((folder / "claims.json").read_text())) == 2
    on_policy = table[(table.method == "on-policy RWR") & (table.step > 0)]
    assert (on_policy.age == 0).all() and (on_policy.reuse == 1).all()
    assert os.listdir(folder / "trials") and (folder / "environment.json").exists()


@pytest.mark.long
def test_a_full_disk_is_named_and_the_study_goes_on_when_there_is_room(
    tmp_path, small, ray_cluster, capfd
):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk here: a full one is unproven")
    try:
        with contextlib.suppress(OSError):  # the study has no room for its files either
            study(small, disk, parallel=1)
        told = capfd.readouterr().err
        assert "reward R1, seed 0: FAILED" in told and "No space left" in told, told
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        folder = study(small, disk, resume=True, parallel=1)
        assert set(curves(folder).reward) == {"R1", "R2"}
    finally:
        subprocess.run(["umount", str(disk)], check=True)
