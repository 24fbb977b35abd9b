"""The doctor's checks of the machine and of Ray's settings there, each provoked at its boundary."""

import os
import socket
import time
from collections import namedtuple
from pathlib import Path

import pytest

from cluster.doctor import doctor
from cluster.doctor import machine as doctor_machine
from cluster.run_directory import RunDirectory
from configs.choices import EngineKind
from tests import examined

GIB = 2**30
plain_environment, config, wheels = examined.plain_environment, examined.config, examined.wheels


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
