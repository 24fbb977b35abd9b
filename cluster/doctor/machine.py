"""The doctor's checks of this machine: memory, disk, what others left or hold, GPUs, compiler."""

import contextlib
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from cluster.doctor.packages import Answer, torch_is_cpu
from configs.choices import EngineKind
from configs.errors import one_line
from configs.schema import Config

SHM, CGROUP = Path("/dev/shm"), Path("/sys/fs/cgroup")
GIB = 2**30
PROCESS, VLLM = 0.5 * GIB, 2.0 * GIB  # bytes, roughly: a process with torch; vLLM's, without cache
SETTLED = 60.0  # seconds: a younger file may be about to be mapped
OTHERS = 5  # processes of a run beside actors, ranks and reward replicas
STORE_SHARE, STORE_MOST = 0.3, 1e10  # Ray's object store: of free memory, at most so many bytes


def ray_address(config: Config) -> str:
    """The Ray cluster to join; empty: one of our own is started."""
    address = config.cluster.address or os.environ.get("RAY_ADDRESS", "")
    return "" if address == "local" else address


def _free_memory() -> float:
    """Bytes that the machine, or the container (cgroup v2), has left."""
    import psutil

    free = float(psutil.virtual_memory().available)
    limit = CGROUP / "memory.max"
    if limit.is_file() and (most := limit.read_text().strip()) != "max":
        cache = re.search(r"^inactive_file (\d+)", (CGROUP / "memory.stat").read_text(), re.M)
        used = int((CGROUP / "memory.current").read_text()) - int(cache[1] if cache else 0)
        free = min(free, int(most) - used)
    return free


def memory(config: Config) -> Answer:
    """Room for a run's processes, by a rough count."""
    actors = config.rollout.actors
    need = PROCESS * (OTHERS + actors + config.learner.ranks + config.reward.replicas)
    if config.rollout.engine is EngineKind.vllm:
        need += actors * (VLLM + config.rollout.vllm.kv_cache_gib * GIB)
    free = _free_memory()
    found = f"{free / GIB:.1f} GiB free; about {need / GIB:.1f} wanted, and the policy's own"
    if free >= need:
        return "ok", found, ""
    fix = "end other programs, or lower rollout.actors, learner.ranks or rollout.vllm.kv_cache_gib"
    return "problem" if free < need / 2 else "warning", found, fix


def shared_memory(config: Config) -> Answer:
    """Room for Ray's object store and for weights on their way to vLLM."""
    if not SHM.is_dir():
        return "ok", f"no {SHM} on this system; Ray and weights use temporary files", ""
    usage = shutil.disk_usage(SHM)
    found = f"{usage.free / GIB:.2f} of {usage.total / GIB:.2f} GiB free in {SHM}"
    store = min(STORE_SHARE * _free_memory(), STORE_MOST)
    size = f"{store / GIB + 1:.0f}g"
    fix = f"--shm-size={size} for a container, else mount -o remount,size={size} {SHM}"
    if usage.free < GIB / 16 and config.rollout.engine is EngineKind.vllm:
        return "problem", f"{found}; weights for vLLM go through it", fix
    if usage.free < store:
        return "warning", f"{found}; Ray's object store falls back to a slow disk", fix
    return "ok", found, ""


def leftovers(config: Config) -> Answer:
    """Files of this user in shared memory that no process has mapped."""
    if not SHM.is_dir() or not Path("/proc/self/maps").exists():
        return "ok", "not looked for on this system", ""
    sizes: dict[str, int] = {}
    for path in SHM.iterdir():
        with contextlib.suppress(FileNotFoundError):  # files and processes come and go
            is_ours = path.is_file() and path.stat().st_uid == os.getuid()
            if is_ours and time.time() - path.stat().st_mtime > SETTLED:
                sizes[str(path)] = 512 * path.stat().st_blocks
    for maps in Path("/proc").glob("[0-9]*/maps") if sizes else ():
        with contextlib.suppress(OSError):
            text = maps.read_text(errors="replace")
            sizes = {name: size for name, size in sizes.items() if name not in text}
    if not sizes:
        return "ok", f"none in {SHM}", ""
    found = f"{len(sizes)} in {SHM}, {sum(sizes.values()) / 1e6:.1f} MB, mapped by no process"
    names = " ".join([*sorted(sizes)[:3], *["..."][: len(sizes) > 3]])
    return "warning", found, f"unless another container uses them: rm {names}"


def disk(config: Config) -> Answer:
    """Room under run.dir, and in the folder that Ray spills to."""
    folder = nearest = Path(config.run.dir)
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    free = shutil.disk_usage(nearest).free
    found = f"{free / GIB:.1f} GiB free for run.dir={folder}"
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        return "problem", f"run.dir={folder} cannot be written", "set run.dir=FOLDER to another"
    if free < GIB:
        fix = "make room, or set run.dir=FOLDER to another disk"
        return "problem" if free < GIB / 10 else "warning", found, fix
    temporary = Path(os.environ.get("RAY_TMPDIR") or "/tmp")
    usage = shutil.disk_usage(temporary)
    if usage.free < 0.05 * usage.total:
        fix = f"make room in {temporary}, or set RAY_TMPDIR"
        return "warning", f"{found}; {temporary} is over 95% full, where Ray stops spilling", fix
    return "ok", found, ""


def running(config: Config) -> Answer:
    """Unfinished runs that a process holds, by their locks."""
    from cluster.run_directory import RunDirectory

    locks = Path(config.run.dir).glob("*/run.lock")
    folders = [lock.parent for lock in locks if not (lock.parent / "summary.json").exists()]
    held = sorted(path.name for path in folders if RunDirectory(path).running())
    if not held:
        return "ok", f"none in {config.run.dir}", ""
    fix = "wait for the end, or stop it with Ctrl-C: runs share cores and memory"
    return "warning", f"still running: {', '.join(held)}", fix


def gpus_wanted(config: Config) -> float:
    """GPUs of all ranks and actors and of the evaluator together."""
    shares = config.cluster
    ranks, actors = config.learner.ranks, config.rollout.actors
    scorers = config.reward.replicas * shares.reward_gpus
    trained = shares.learner_gpus * ranks
    return trained + shares.actor_gpus * actors + shares.evaluator_gpus + scorers


def gpus(config: Config) -> Answer:
    """NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves, against those that the settings take."""
    wanted = gpus_wanted(config)
    devices, error = 0, "no nvidia-smi"
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "-L"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
        devices = len(re.findall(r"^GPU \d", done.stdout, re.MULTILINE))
        error = "" if devices else f"nvidia-smi: {one_line(done.stdout + done.stderr) or 'no GPU'}"
    found = f"{devices} NVIDIA GPU{'' if devices == 1 else 's'}, {wanted:g} wanted"
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        found += f", CUDA_VISIBLE_DEVICES={chosen or '(none)'}"
        devices = min(devices, len([d for d in chosen.split(",") if d.strip() not in ("", "-1")]))
    if wanted > devices and ray_address(config):
        return "ok", f"{found}: they may be on the cluster's nodes, which are not looked at", ""
    if wanted > devices:
        fix = "set cluster.learner_gpus and .actor_gpus to what is here, or see to the driver"
        return "problem", f"{found} ({error})" if error else found, fix
    if wanted and devices and torch_is_cpu():
        fix = "make clean, then make bandit TORCH=torch==2.13.0 EXTRAS=vllm"
        return "problem", f"{found}, and torch is a CPU build", fix
    return "ok", found, ""


def compiler(config: Config) -> Answer:
    """What compiles: Triton's kernels on a GPU, and rollout.vllm.compile."""
    names = [os.environ.get("CC"), "cc", "gcc", "clang"], [os.environ.get("CXX"), "c++", "g++"]
    found = [next((n for n in group if n and shutil.which(n.split()[0])), "") for group in names]
    if all(found):
        return "ok", " and ".join(found), ""
    compiles = config.rollout.engine is EngineKind.vllm and config.rollout.vllm.compile
    if not compiles and not gpus_wanted(config):
        return "ok", "none, and nothing is compiled with these settings", ""
    fix = "install gcc and g++, or set rollout.vllm.compile=false"
    return "problem", "no C and C++ compiler", fix
