"""A run's directory on object storage as well (`run.mirror`), and from there to another machine.

A run renames, locks and appends, which object storage has not. So it lives in `run.dir`, and a
thread of the driver brings over what changed, every SECONDS and at the end. The journal goes first,
then checkpoints, their manifests after their other files, and summary.json last: what was broken
off in between is no checkpoint and no finished run there. A run whose directory is not here, and
whose mirror is there, is fetched and gone on with from its newest checkpoint; what came after the
last copy is then unknown to its ledger.

    with kept(config, directory.path, say):
        ...  # the run
"""

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cluster.checkpoints import MANIFEST
from cluster.restarts import reason
from configs.choices import Resume
from configs.errors import ConfigError
from configs.schema import Config

SECONDS = 60.0
ROUNDS = 3  # at once, where files went away while they were brought over
_LOCAL = ("run.lock", "faults")  # of this machine
Say = Callable[[str], None]


def check(config: Config) -> None:
    """ConfigError where the mirror cannot be written, or the run has no name to be found by."""
    url = config.run.mirror
    if not url:
        return
    if not config.run.name:
        problem = "a run with run.mirror needs a name, to be found by"
        raise ConfigError("run.name", "", problem, "set run.name")
    try:
        files, root = _storage(url)
        files.makedirs(root, exist_ok=True)
        files.pipe_file(f"{root}/.onpolicy", b"")
    except Exception as error:  # of whichever storage it is
        fix = "look at its address, the rights to it, and the package that fsspec names for it"
        raise ConfigError("run.mirror", url, reason(error), fix) from error


def fetch(config: Config, directory: Path) -> None:
    """Bring a run's directory here from the mirror, where there is one only there."""
    if not config.run.mirror or directory.exists() or config.resume is Resume.never:
        return
    files, remote = _opened(config, directory)
    part = directory.with_name(directory.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    for name in sorted(files.find(remote)):
        target = part / name.removeprefix(remote).lstrip("/")
        if not target.resolve().is_relative_to(part.resolve()):
            raise ConfigError("run.mirror", config.run.mirror, f"holds {name}", "remove that")
        target.parent.mkdir(parents=True, exist_ok=True)
        files.get_file(name, str(target))
    if part.exists():
        os.rename(part, directory)


@contextlib.contextmanager
def kept(config: Config, directory: Path, say: Say) -> Iterator[None]:
    """Mirror a directory while the block runs, and once more at its end, as far as
    `limits.wait_seconds` lets that take; nothing without run.mirror. What goes wrong is said and
    stops nothing."""
    if not config.run.mirror:
        yield
        return
    mirror = Mirror(*_opened(config, directory), directory, say)
    thread = threading.Thread(target=mirror.run, name="mirror", daemon=True)
    thread.start()
    try:
        yield
    finally:
        mirror.end.set()
        thread.join(limit := config.limits.wait_seconds)
        if thread.is_alive():
            say(f"run.mirror: still not whole after {limit:g} s (limits.wait_seconds)")


def _storage(url: str) -> tuple[Any, str]:
    """The file system that a URL names, and the path in it."""
    import fsspec  # which runs without a mirror need not wait for

    files, root = fsspec.core.url_to_fs(url)
    return files, root.rstrip("/")


def _opened(config: Config, directory: Path) -> tuple[Any, str]:
    """The storage, and where in it a directory's copy is: by its path under `run.dir`."""
    files, root = _storage(config.run.mirror)
    base, own = Path(config.run.dir).resolve(), directory.resolve()
    place = own.relative_to(base) if own.is_relative_to(base) else Path(own.name)
    return files, f"{root}/{place.as_posix()}"


class Mirror:
    """One directory's copy. files: an fsspec file system; remote: the copy's path in it."""

    def __init__(self, files: Any, remote: str, directory: Path, say: Say) -> None:
        self.files, self.remote, self.directory, self.say = files, remote, directory, say
        self.end = threading.Event()
        self._sent: dict[str, tuple[int, int]] | None = None  # size and time of what is there
        self._failed = ""

    def run(self) -> None:
        """Bring over what changed, again and again, and once more when `end` is set."""
        while not self.end.wait(SECONDS):
            self._try()
        self._failed = ""  # said again
        self._try()

    def _try(self) -> None:
        try:
            for _ in range(ROUNDS):
                if self.push():
                    break
            self._failed = ""
        except Exception as error:  # of whichever storage it is
            if (why := reason(error)) != self._failed:
                self.say(f"run.mirror: {why}")
            self._failed = why

    def push(self) -> bool:
        """Bring over what changed; what went away here is removed there, once all else is there.

        False where a file went away meanwhile, so that the copy may lack what belongs to it.
        """
        if self._sent is None:
            known = self.files.find(self.remote)
            self._sent = {name.removeprefix(self.remote).lstrip("/"): (-1, 0) for name in known}
        found, whole = _files(self.directory), True
        for name in sorted(found, key=_order):
            if self._sent.get(name) != found[name]:
                whole &= self._send(name, found[name])
        if whole:
            for name in set(self._sent) - set(found):
                self.files.rm_file(f"{self.remote}/{name}")
                del self._sent[name]
        return whole

    def _send(self, name: str, stamp: tuple[int, int]) -> bool:
        assert self._sent is not None
        target = f"{self.remote}/{name}"
        try:
            self.files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self.files.put_file(str(self.directory / name), target)
        except FileNotFoundError:
            if (self.directory / name).exists():
                raise  # it is the storage's
            return False
        self._sent[name] = stamp
        return True


def _files(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and time of each file that belongs to the copy, by its path."""
    found = {}
    for path in directory.rglob("*"):
        inside = path.relative_to(directory)
        unfinished = any(part.endswith(".part") for part in inside.parts)
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and not unfinished and inside.parts[0] not in _LOCAL:
                stat = path.stat()
                found[inside.as_posix()] = (stat.st_size, stat.st_mtime_ns)
    return found


def _order(name: str) -> tuple[int, str]:
    """What makes a thing whole comes after the rest of it."""
    first = {"journal": 0, "checkpoints": 2}.get(name.partition("/")[0], 1)
    return {MANIFEST: 3, "summary.json": 4}.get(name.rpartition("/")[2], first), name
