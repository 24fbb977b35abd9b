"""`python -m cluster doctor`: can this machine run these settings, and what to do where it cannot.

A check looks, changes nothing, and imports neither torch nor Ray nor vLLM: the doctor also works
where one of those is what is broken. Its answer is a status, what was found, and what to do.
"""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from cluster.doctor import machine as doctor_machine
from cluster.doctor import packages as doctor_packages
from cluster.doctor.machine import ray_address
from cluster.doctor.packages import INSTALL, Answer
from configs.errors import one_line
from configs.schema import Config


class Finding(NamedTuple):
    """What one check found. status: ok, warning or problem; fix: empty where there is none."""

    name: str
    status: str
    found: str
    fix: str


def _port(config: Config) -> Answer:
    """The one port that a setting names; everything else binds free ones."""
    port = config.reward.port
    if not port:
        return "ok", "none needed: reward.port=0, and Ray of our own takes free ones", ""
    if ray_address(config):
        return "ok", f"reward.port={port} is on the cluster's head node: not looked at", ""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return "problem", f"reward.port={port}: {error.strerror}", "set reward.port to another"
    return "ok", f"reward.port={port} is free on loopback", ""


def _ray(config: Config) -> Answer:
    """Whether a named cluster takes connections; its Ray's version is not looked at."""
    address = ray_address(config)
    if not address:
        return "ok", "no address: a run starts Ray of its own here", ""
    fix = "start it (ray start --head), correct RAY_ADDRESS or cluster.address, or leave both empty"
    if address.startswith("http"):
        return "problem", f"{address} is the job API", f"{fix}; a run wants HOST:PORT of Ray itself"
    target = address
    if address == "auto":
        known = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"
        if not known.is_file():
            return "problem", "address auto, and no Ray runs on this machine", fix
        target = known.read_text(encoding="utf-8").strip()
    host, _, port = target.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
    except (OSError, ValueError) as error:
        return "problem", f"{address} cannot be reached: {error}", fix
    return "ok", f"{address} answers; of its nodes nothing is looked at: run the doctor there", ""


def _token(config: Config) -> Answer:
    """Ray's token authentication; the token itself is never shown."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named or Path.home() / ".ray" / "auth_token")
    found = "from RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else ""
    if not found and path.is_file() and path.stat().st_size:
        found = "from RAY_AUTH_TOKEN_PATH" if named else "from the home folder"
    if mode == "disabled":
        fix = "unset RAY_AUTH_MODE"
        return "warning", "off: who reaches Ray's ports can run code as you", fix
    if found.endswith("home folder") and path.stat().st_mode & 0o077:
        return "warning", f"token {found}, which others may read", f"chmod 600 {path}"
    if found:
        return "ok", f"token {found}", ""
    fix = "on the head node: ray get-auth-token; here: put it into RAY_AUTH_TOKEN"
    if named:
        return "problem", "RAY_AUTH_TOKEN_PATH names no file with a token", f"{fix}, or unset it"
    if not ray_address(config):
        return "ok", "no token yet: Ray of our own makes one", ""
    status = "problem" if mode == "token" else "warning"
    return status, "no token: a cluster that asks for one will refuse the run", fix


def _proxy(config: Config) -> Answer:
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0") != "1":
        return "ok", "RAY_SERVE_ENABLE_HA_PROXY is not on", ""
    status = "problem" if config.reward.port else "warning"
    found = "RAY_SERVE_ENABLE_HA_PROXY=1: HAProxy listens beyond loopback"
    return status, f"{found}, so reward.port is refused", "unset RAY_SERVE_ENABLE_HA_PROXY"


CHECKS: dict[str, Callable[[Config], Answer]] = {
    "Python": doctor_packages.python,
    "packages": doctor_packages.packages,
    "torchvision trap": doctor_packages.misfits,
    "vLLM": doctor_packages.vllm,
    "memory": doctor_machine.memory,
    "shared memory": doctor_machine.shared_memory,
    "files left behind": doctor_machine.leftovers,
    "disk": doctor_machine.disk,
    "other runs": doctor_machine.running,
    "ports": _port,
    "Ray address": _ray,
    "Ray token": _token,
    "Serve proxy": _proxy,
    "GPUs": doctor_machine.gpus,
    "compiler": doctor_machine.compiler,
}


def examine(config: Config) -> Iterator[Finding]:
    """Every check's finding; a check that breaks is a warning, never an exception."""
    for name, check in CHECKS.items():
        try:
            answer = check(config)
        except Exception as error:
            found = f"not known: {type(error).__name__}: {error}"
            fix = "look into it by hand; the other checks stand"
            answer = "warning", found, INSTALL if isinstance(error, ImportError) else fix
        yield Finding(name, answer[0], one_line(answer[1]), answer[2])


def report(findings: list[Finding], colour: bool = False) -> str:
    """A line for each finding, its fix indented below, and a line that counts."""
    paint = {"ok": "32", "warning": "33", "problem": "31"} if colour else {}
    width = max(len(finding.name) for finding in findings)
    lines = []
    for name, status, found, fix in findings:
        word = f"{status:<8}"
        word = f"\033[{paint[status]}m{word}\033[0m" if paint else word
        lines.append(f"{word} {name:<{width}}  {found}")
        lines += [f"{'':9}{'':{width}}  fix: {fix}"] if fix else []
    for status in ("problem", "warning"):
        count = sum(finding.status == status for finding in findings)
        lines.append(f"{count or 'no'} {status}{'' if count == 1 else 's'}")
    return "\n".join([*lines[:-2], f"{lines[-2]}, {lines[-1]}"])


def main(preset: str, settings: list[str]) -> int:
    """Print the report; 0 without a problem, else 1. ConfigError for settings that make no run."""
    try:
        from configs.load import prepare
    except ImportError as error:
        config, read = Config(), ("problem", f"defaults, not {preset}: {error}", INSTALL)
    else:
        config, read = prepare(preset, settings), ("ok", " ".join([preset, *settings]), "")
    findings = [Finding("settings", *read), *examine(config)]
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(report(findings, colour))
    return int(any(finding.status == "problem" for finding in findings))
