"""A run's directory on object storage as well (`run.mirror`), and from there to another machine.

A run renames, locks and appends, which object storage has not. So it lives in `run.dir`, and a
thread of the driver brings over what changed, every SECONDS and at the end: the newest checkpoint,
and every other file but the journal. A checkpoint's manifest comes after its other files and
summary.json last of all, so that what was broken off in between is no checkpoint and no finished
run there; what is no longer here is removed there once all else is there.

A run that is only there is fetched, and goes on from its newest checkpoint as if nothing had come
after. A copy belongs to the directory where a run last began, by an id that each start makes anew:
the copy has the last one, a directory all that it knows of. Where another directory has taken a
copy over, or nothing of ours made it, it is refused and not written to.

    meet(config, directory)  # before a run's directory is taken
    with kept(config, directory, say):
        ...  # the run
"""

import contextlib
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cluster.checkpoints import MANIFEST, Checkpoints
from cluster.restarts import reason
from configs.choices import Resume
from configs.errors import ConfigError
from configs.schema import Config

SECONDS = 60.0
ATTEMPTS = 3  # at once, where a file went away while it was brought over
OWNER = ".mirror"  # the id, there and here
SUMMARY = "summary.json"
_LOCAL = ("run.lock", "faults", "journal", OWNER)
Say = Callable[[str], None]


def check(config: Config) -> None:
    """ConfigError where the mirror cannot be written, or the run has no name to be found by."""
    if not config.run.mirror:
        return
    if not config.run.name:
        problem = "a run with run.mirror needs a name, to be found by"
        raise ConfigError("run.name", "", problem, "set run.name")
    with _stated(config):
        files, root = _storage(config.run.mirror)
        files.pipe_file(f"{root}/.onpolicy", b"")


def meet(config: Config, directory: Path) -> None:
    """Fetch a run that is only on the mirror. ConfigError where its copy is not this directory's.

    With resume=never an unfinished one is left to be written over.
    """
    if not config.run.mirror:
        return
    with _stated(config):
        files, remote = _opened(config, directory)
        names = files.find(remote)
        owner = files.cat_file(f"{remote}/{OWNER}").decode() if f"{remote}/{OWNER}" in names else ""
    here = directory.exists() and any(p.name != OWNER for p in directory.iterdir())
    finished = f"{remote}/{SUMMARY}" in names
    if finished and (directory / SUMMARY).exists():
        return  # nothing more is written to either
    if names and (not owner or (here and owner not in _ids(directory))):
        problem = f"{remote} is not the copy of {directory}"
        fix = f"take another run.name, or remove {directory} to go on with what is there"
        if not owner:
            fix = "take another run.name or run.mirror"
        raise ConfigError("run.mirror", config.run.mirror, problem, fix)
    if names and not here and (finished or config.resume is not Resume.never):
        with _stated(config):
            _fetch(files, remote, names, directory)


def _fetch(files: Any, remote: str, names: list[str], directory: Path) -> None:
    part = directory.with_name(f"{directory.name}.{os.getpid()}.part")
    try:
        for name in names:
            target = part / name.removeprefix(remote).lstrip("/")
            if not target.resolve().is_relative_to(part.resolve()):
                raise ValueError(f"{name} would lie outside the run")
            target.parent.mkdir(parents=True, exist_ok=True)
            files.get_file(name, str(target))
        shutil.rmtree(directory, ignore_errors=True)  # empty but for an id
        os.rename(part, directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def kept(config: Config, directory: Path, say: Say) -> Iterator[None]:
    """Mirror a directory while the block runs, and once more at its end, for at most
    `limits.mirror_seconds`; nothing without run.mirror. What goes wrong is said and stops nothing.
    """
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
        thread.join(limit := config.limits.mirror_seconds)
        if thread.is_alive():
            say(f"run.mirror: not whole after {limit:g} s (limits.mirror_seconds): copy the rest")


@contextlib.contextmanager
def _stated(config: Config) -> Iterator[None]:
    """The storage's errors as ConfigError."""
    try:
        yield
    except Exception as error:  # of whichever storage it is
        fix = "look at its address, the rights to it, and the package that fsspec names for it"
        raise ConfigError("run.mirror", config.run.mirror, reason(error), fix) from error


def _storage(url: str) -> tuple[Any, str]:
    """The file system that a URL names, and the path in it."""
    import fsspec  # which runs without a mirror need not wait for

    # Elsewhere a missing folder is none, and a missing bucket is not to be made.
    options = {"auto_mkdir": True} if url.startswith("file://") else {}
    files, root = fsspec.core.url_to_fs(url, **options)
    return files, root.rstrip("/")


def _opened(config: Config, directory: Path) -> tuple[Any, str]:
    """The storage, and where in it a directory's copy is: by its path under `run.dir`."""
    files, root = _storage(config.run.mirror)
    base, own = Path(config.run.dir).resolve(), directory.resolve()
    place = own.relative_to(base) if own.is_relative_to(base) else Path(own.name)
    return files, f"{root}/{place.as_posix()}"


def _ids(directory: Path) -> list[str]:
    """The ids that a directory's copy may have."""
    file = directory / OWNER
    return file.read_text(encoding="utf-8").split() if file.exists() else []


class Mirror:
    """One directory's copy. files: an fsspec file system; remote: the copy's path in it."""

    def __init__(self, files: Any, remote: str, directory: Path, say: Say) -> None:
        self.files, self.remote, self.directory, self.say = files, remote, directory, say
        self.end = threading.Event()
        self._there: set[str] | None = None  # names in the copy
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of what was brought over
        self._id = uuid.uuid4().hex
        self._newest: tuple[str, int] = ("", 0)  # checkpoint that was looked at, and its time
        self._checkpoint: set[str] = set()  # names of the one that is there
        self._failed = ""

    def run(self) -> None:
        """Bring over what changed, again and again, and once more when `end` is set."""
        self._try()
        while not self.end.wait(SECONDS):
            self._try()
        self._failed = ""  # said again
        self._try()

    def _try(self) -> None:
        for attempt in range(ATTEMPTS):
            try:
                self.push()
                self._failed = ""
                return
            except Exception as error:  # of whichever storage it is, or a file that went away
                went = isinstance(error, FileNotFoundError | shutil.Error)
                if went and attempt < ATTEMPTS - 1:
                    continue
                if (why := reason(error)) != self._failed:
                    self._failed = why
                    with contextlib.suppress(OSError):  # a reader that went away
                        self.say(f"run.mirror: {why}")
                return

    def push(self) -> None:
        """Bring over what changed, then remove there what is no longer here.

        A directory that has gone, its disk unmounted say, changes nothing there. OSError and the
        like: not all of it is there, and nothing was removed.
        """
        if not self.directory.is_dir() or not any(self.directory.iterdir()):
            return
        there = self._begun()
        self._check_owner()
        links = self.directory / "checkpoints" / f"mirror-{self._id[:8]}.part"
        try:  # linked before the rest is listed, which is then as new or newer
            newest, checkpoint = self._pin(links)
            found = _files(self.directory)
            last = {SUMMARY: found.pop(SUMMARY)} if SUMMARY in found else {}
            for target, path in {**found, **checkpoint, **last}.items():
                self._send(target, path)
        finally:
            shutil.rmtree(links, ignore_errors=True)
        if newest != self._newest:
            self._newest, self._checkpoint = newest, set(checkpoint)
        self._check_owner()
        for target in there - {*found, *last, *self._checkpoint, OWNER}:
            with contextlib.suppress(FileNotFoundError):
                self.files.rm_file(f"{self.remote}/{target}")
            there.remove(target)
            self._sent.pop(target, None)

    def _check_owner(self) -> None:
        if (owner := self.files.cat_file(f"{self.remote}/{OWNER}").decode()) != self._id:
            raise RuntimeError(f"{self.remote} was taken over from elsewhere ({owner[:8]})")

    def _pin(self, links: Path) -> tuple[tuple[str, int], dict[str, Path]]:
        """The newest checkpoint and its time, and the files of the newest that is whole by their
        names there, the manifest last, from links of ours: it may be pruned while it is brought
        over. No files where it is there already."""
        checkpoints = Checkpoints(self.directory / "checkpoints", 1)
        if not (batches := checkpoints.batches()):
            return ("", 0), {}
        path = checkpoints.path(batches[-1])
        newest = path.name, (path / MANIFEST).stat().st_mtime_ns
        if newest == self._newest or (whole := checkpoints.newest(lambda _: None)) is None:
            return self._newest, {}
        shutil.copytree(whole, links, copy_function=_link)
        paths = sorted(p for p in links.rglob("*") if p.is_file())
        paths.sort(key=lambda p: p.name == MANIFEST)
        files = {f"checkpoints/{whole.name}/{p.relative_to(links).as_posix()}": p for p in paths}
        return newest, files

    def _begun(self) -> set[str]:
        """The names in the copy, which is made this directory's own, and unfinished, at first."""
        if self._there is None:
            names = self.files.find(self.remote)
            there = {name.removeprefix(self.remote).lstrip("/") for name in names}
            if self._id not in _ids(self.directory):
                with (self.directory / OWNER).open("a", encoding="utf-8") as file:
                    file.write(f"\n{self._id}\n")  # one that was fetched ends without
            self.files.pipe_file(f"{self.remote}/{OWNER}", self._id.encode())
            if SUMMARY in there and not (self.directory / SUMMARY).exists():
                self.files.rm_file(f"{self.remote}/{SUMMARY}")
                there.remove(SUMMARY)
            self._there = there
        return self._there

    def _send(self, name: str, path: Path) -> None:
        stat = path.stat()
        stamp = (stat.st_size, stat.st_mtime_ns)
        if self._sent.get(name) != stamp:
            self.files.put_file(str(path), f"{self.remote}/{name}")
            self._sent[name] = stamp
            self._begun().add(name)


def _files(directory: Path) -> dict[str, Path]:
    """What belongs to the copy beside checkpoints, by its name there. OSError where that cannot be
    known."""
    found: dict[str, Path] = {}

    def failed(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(directory, onerror=failed):
        inside = Path(folder).relative_to(directory)
        folders[:] = sorted(d for d in folders if _belongs(inside / d))
        for name in sorted(names):
            if _belongs(inside / name):
                found[(inside / name).as_posix()] = Path(folder) / name
    return found


def _belongs(inside: Path) -> bool:
    checkpoint = inside.parts[0] == "checkpoints" and inside.name.startswith("batch-")
    return inside.suffix != ".part" and inside.parts[0] not in _LOCAL and not checkpoint


def _link(source: str, target: str) -> None:
    """One file under two names, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
