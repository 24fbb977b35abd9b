"""`python -m cluster submit`: a run as a Ray job, checked here before anything is sent.

It does what `ray job submit` does with `runtime_env.yaml` beside this file, and refuses first what
the job would be refused for.
"""

import asyncio
import os
import re
import shlex
import tomllib
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from configs.errors import ConfigError
from configs.load import prepare

ROOT = Path(__file__).parents[2]
RUNTIME_ENV = Path(__file__).with_name("runtime_env.yaml")
ADDRESS = "http://127.0.0.1:8265"
IN_JOB = "${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}"  # Ray's name for the folder that was sent


def submit(
    preset: str, settings: list[str], address: str = "", install: bool = False, wait: bool = True
) -> int:
    """Submit a run, and follow its output to the end unless `wait` is False; 0 where it succeeded.

    address: of Ray's dashboard; empty: RAY_API_SERVER_ADDRESS, else ADDRESS. The token is Ray's
    own business (RAY_AUTH_MODE, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH). install: pinned packages
    on the nodes, beside what they have. ValueError in one line for settings that a run would be
    refused for, and for a cluster that does not answer.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    address = address or os.environ.get("RAY_API_SERVER_ADDRESS", "") or ADDRESS
    settings = [*settings, *_absolute(prepare(preset, settings).run.dir, address)]
    command = shlex.join(["python", "-m", "cluster", "train", preset, *settings])
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(entrypoint=command, runtime_env=runtime_env(install))
    except (AuthenticationError, OSError, RuntimeError) as error:
        problem = f"no job was taken: {str(error).strip().splitlines()[0]}"
        fix = "name the dashboard's address, and carry the cluster's token (docs/operations.md)"
        raise ConfigError("--address", address, problem, fix) from error
    at = f"--address {address} {job}"
    print(f"{job}: {command}\n  ray job logs -f {at}\n  ray job stop {at}", flush=True)
    return asyncio.run(_follow(client, job)) if wait else 0


async def _follow(client: Any, job: str) -> int:
    async for text in client.tail_job_logs(job):
        print(text, end="", flush=True)
    return 0 if client.get_job_status(job) == "SUCCEEDED" else 1


def runtime_env(install: bool = False, folder: Path = ROOT) -> dict[str, Any]:
    """Ray's runtime environment of a job: this folder without what `excludes` names."""
    content: dict[str, Any] = yaml.safe_load(RUNTIME_ENV.read_text(encoding="utf-8"))
    content["working_dir"] = str(folder)
    if install:
        content["pip"] = {"packages": pinned(folder), "pip_check": False}
    return content


def pinned(folder: Path = ROOT) -> list[str]:
    """What a run needs, each at the version of constraints.txt, which also pins what those need."""
    versions = dict(
        line.lower().split("==") for line in (folder / "constraints.txt").read_text().split()
        if line.count("==") == 1
    )  # fmt: skip
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    lines = []
    for need in project["dependencies"]:
        name, extras = re.match(r"([\w.-]+)(\[.*?\])?", need).groups("")  # type: ignore[union-attr]
        lines.append(f"{name}{extras or ''}=={versions[name]}")
    return [*lines, f"-c {IN_JOB}/constraints.txt"]


def _absolute(folder: str, address: str) -> list[str]:
    """The setting of a run's folder that holds in the job, too, which runs in a copy of ours."""
    if Path(folder).is_absolute():
        return []
    if not _is_loopback(urlsplit(address).hostname or ""):
        problem = "a job runs in a copy of this folder, which Ray removes"
        raise ConfigError("run.dir", folder, problem, "set run.dir to a path that all nodes share")
    return [f"run.dir={Path(folder).resolve()}"]


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
