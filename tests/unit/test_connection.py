"""Connecting to Ray."""

import os
import stat
from pathlib import Path

import ray

from cluster.connection import connected
from configs.schema import ClusterConfig


def test_rays_token_is_read_by_this_user_only(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    token = tmp_path / ".ray" / "auth_token"
    seen: list[int] = []

    def init(**_: object) -> None:  # as Ray 2.60 does where there is no token
        seen.append(stat.S_IMODE(token.parent.stat().st_mode))
        token.write_text("secret")
        token.chmod(0o644)

    monkeypatch.setattr(ray, "init", init)
    with connected(ClusterConfig()):
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert seen == [0o700]  # nor in the instant before
