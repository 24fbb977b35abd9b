"""Checkpoints on disk: `checkpoints/batch-N/`, whole or not there.

A checkpoint is written beside, as `batch-N.part`, and gets its name last. Its manifest has every
file's size and SHA-256, so that one which was cut short, or has a flipped bit, is named and passed
over for the one before.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs import faults
from configs.errors import one_line

MANIFEST = "manifest.json"
DRIVER = "driver.json"
_NAME = re.compile(r"batch-([0-9]{8})")
_CHUNK = 1 << 20


class BadCheckpoint(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


class Checkpoints:
    """Those of one run."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def batches(self) -> list[int]:
        """Batches at which there is one by name, in order."""
        found = self.folder.iterdir() if self.folder.is_dir() else iter(())
        return sorted(int(m[1]) for p in found if (m := _NAME.fullmatch(p.name)))

    def path(self, batch: int) -> Path:
        return self.folder / f"batch-{batch:08d}"

    def begin(self, batch: int) -> Path:
        """An empty folder to write one into, without its name yet. OSError where there is none."""
        part = self.path(batch).with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        return part

    def complete(self, part: Path, driver: dict[str, Any]) -> Path:
        """Add the driver's state and the manifest, and give it its name."""
        (part / DRIVER).write_text(json.dumps(driver), encoding="utf-8")
        files = sorted(p for p in part.rglob("*") if p.is_file())
        manifest = {str(p.relative_to(part)): [p.stat().st_size, _sha256(p)] for p in files}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        path = part.with_suffix("")
        faults.hit("driver.rename.before")
        if path.exists():  # a bad one, or it would have been gone on from
            shutil.rmtree(path)
        os.rename(part, path)
        faults.hit("driver.rename.after")
        return path

    def newest(self, say: Callable[[str], None]) -> Path | None:
        """The newest that is whole; each newer one that is not is named."""
        for batch in reversed(self.batches()):
            try:
                verify(self.path(batch))
            except BadCheckpoint as error:
                say(f"checkpoint passed over: {error}")
            else:
                return self.path(batch)
        return None

    def clean(self) -> None:
        """Remove what was never finished."""
        for part in self.folder.glob("*.part"):
            shutil.rmtree(part, ignore_errors=True)

    def prune(self) -> int:
        """Remove all but the newest `keep`; returns the oldest batch that is left."""
        batches = self.batches()
        for batch in batches[: -self.keep]:
            shutil.rmtree(self.path(batch), ignore_errors=True)
        return batches[-self.keep :][0]


def driver_state(path: Path) -> dict[str, Any]:
    """What `complete` was given. BadCheckpoint where that cannot be read."""
    return _read_json(path / DRIVER)


def verify(path: Path) -> None:
    """Check every file against the manifest; BadCheckpoint names the first that differs.

    Only files that lie in the checkpoint's own folder are looked at, whatever the manifest names.
    """
    manifest = path / MANIFEST
    entries = _read_json(manifest)
    try:
        expected = {name: (int(size), str(digest)) for name, (size, digest) in entries.items()}
    except (ValueError, TypeError, OverflowError) as error:
        raise BadCheckpoint(f"{manifest}: cannot be read: {type(error).__name__}") from error
    if DRIVER not in expected:
        raise BadCheckpoint(f"{manifest}: names no {DRIVER}")
    there = {str(file.relative_to(path)): file for file in _files(path)}
    for name, (size, digest) in expected.items():
        file = there.get(name)
        if file is None:
            raise BadCheckpoint(f"{path}: holds no file {one_line(name)}")
        try:
            found = file.stat().st_size
            if found != size:
                raise BadCheckpoint(f"{file}: has {found} bytes, and had {size}")
            if _sha256(file) != digest:
                raise BadCheckpoint(f"{file}: is not what was written")
        except OSError as error:
            raise BadCheckpoint(f"{file}: cannot be read: {error.strerror}") from error


def _files(path: Path) -> list[Path]:
    """The plain files of a folder and of those inside it; what links elsewhere is left out."""
    home = path.resolve()
    return [p for p in path.rglob("*") if p.is_file() and p.resolve().is_relative_to(home)]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if not file.is_file():  # a pipe would never come to its end
            raise FileNotFoundError
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{file}: cannot be read: {type(error).__name__}") from error
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{file}: is not a JSON object")
    return content


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
