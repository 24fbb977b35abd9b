"""What the doctor examines in tests: an environment that says nothing, settings, wheels made here.

A test file takes the fixtures as its own: `config = examined.config`.
"""

from pathlib import Path

import pytest

from configs.schema import Config


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch, tmp_path):
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
