"""What leaves a run's curve alone: actors that come and go, and requests that are refused."""

import json
import secrets
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray

from cluster.__main__ import main
from cluster.train import train
from configs.load import prepare
from tests.harness import free_port

UPDATES = 60
COMMON = ["replay.inner_epochs=1", f"learner.updates={UPDATES}", "rollout.lease=2",
          "eval.every=0", "eval.samples=20"]  # fmt: skip
SLOW = ["run.name=scaled", "reward.kind=function", "reward.replicas=3",
        "reward.path=slow_reward:score"]  # fmt: skip
SLOW_REWARD = """
import time
from pathlib import Path
from configs.schema import RewardConfig
from reward_server.rewards import load

REWARD, SLOW = load(RewardConfig()), Path(__file__).with_name("slow")

def score(prompts, responses):
    if SLOW.exists():
        time.sleep(0.15)  # a call: generation is then as fast as there are actors
    return list(REWARD(prompts, responses))
"""


def lines(run: Path) -> list[dict[str, Any]]:
    metrics = run / "metrics.jsonl"
    written = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return [json.loads(line) for line in written if line.endswith("\n")]


def losses(run: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["reward_mean"]) for line in lines(run)]


class Scaler(threading.Thread):
    """Asks for three actors, waits for what they do to the rate, and asks for one again.

    seconds: of a round, the median of some with one actor, with three, and with one.
    """

    def __init__(self, run: Path, slow: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.slow = run, slow
        self.seconds: list[float] = []
        self.statuses: list[int] = []

    def run(self) -> None:
        one = self.round(since=1)
        self.seconds.append(one)
        done = self.scale(3)
        while (three := self.round(since=done)) > one / 1.4 and done < UPDATES - 15:
            done += 1
        self.seconds.append(three)
        self.seconds.append(self.round(since=self.scale(1) + 1))
        self.slow.unlink()

    def scale(self, actors: int) -> int:
        """Ask; returns how many updates there are afterwards."""
        self.statuses.append(main(["scale", str(self.folder), "--actors", str(actors)]))
        return len(lines(self.folder))

    def round(self, since: int, count: int = 5) -> float:
        """Of `count` updates from the one after `since` on, once they are there."""
        while len(found := lines(self.folder)) < min(since + count, UPDATES):
            time.sleep(0.05)
        return float(np.median([line["step_seconds"] for line in found[since:][:count]]))


@pytest.fixture(scope="module")
def undisturbed(crew, tmp_path_factory) -> list[tuple[float, float]]:
    """The curve of a run with one actor that is left alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = prepare("bandit_ppo", [f"run.dir={folder}", "run.name=alone", *COMMON])
    assert train(config, "bandit_ppo", crew)["status"] == "finished"
    return losses(folder / "alone")


def test_actors_that_come_and_go_change_the_rate_and_not_the_curve(
    undisturbed, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "slow_reward.py").write_text(SLOW_REWARD)
    (tmp_path / "slow").touch()
    scaler = Scaler(tmp_path / "scaled", tmp_path / "slow")
    scaler.start()
    summary = train(prepare("bandit_ppo", [f"run.dir={tmp_path}", *COMMON, *SLOW]), "bandit_ppo")

    assert summary["status"] == "finished", summary["failure"]
    assert scaler.statuses == [0, 0]
    one, three, one_again = scaler.seconds
    assert three < one / 1.4 and three < one_again / 1.4
    assert losses(tmp_path / "scaled") == undisturbed
    ledger = summary["ledger"]
    assert ledger["retired"]["exhausted"] == ledger["issued"] == UPDATES * 100
    assert ledger["in_flight"] == ledger["queued"] == 0
    assert summary["recovery"]["restarts"]["actors"] == 0


GOOD = json.dumps({"prompts": [[0]], "responses": [[70]]}).encode()
LIMIT = 20_000  # bytes of a request


class Stranger(threading.Thread):
    """Sends what is to be refused, for as long as the endpoint is there."""

    def __init__(self, port: int, token: str) -> None:
        super().__init__(daemon=True)
        self.url = f"http://127.0.0.1:{port}"
        mine = {"Authorization": f"Bearer {token}"}
        self.requests = [
            (401, {"content": GOOD}),
            (401, {"content": GOOD, "headers": {"Authorization": "Bearer wrong"}}),
            (413, {"content": b" " * (LIMIT + 1), "headers": mine}),
            (400, {"content": b"{not json", "headers": mine}),
        ]
        self.answers: list[tuple[int, int, float]] = []  # expected, given, seconds

    def run(self) -> None:
        with httpx.Client(base_url=self.url, trust_env=False) as client:
            until = time.monotonic() + 60
            while not self.there(client) and time.monotonic() < until:
                time.sleep(0.1)
            try:
                while True:
                    self.ask(client)
                    time.sleep(0.05)
            except httpx.HTTPError:
                return  # the run is over

    def there(self, client: httpx.Client) -> bool:
        try:
            return client.get("/health").status_code == 200
        except httpx.HTTPError:
            return False

    def ask(self, client: httpx.Client) -> None:
        for expected, request in self.requests:
            began = time.monotonic()
            answer = client.post("/score", **request)
            if answer.status_code in (404, 503):  # Serve takes the app down
                raise httpx.ReadError("the run is over")
            self.answers.append((expected, answer.status_code, time.monotonic() - began))


def test_requests_that_are_refused_are_logged_once_and_change_nothing(
    undisturbed, crew, tmp_path, monkeypatch
):
    crew.end()  # its Serve has no HTTP, and ends with it
    port, token = free_port(), secrets.token_hex(16)
    monkeypatch.setenv("ONPOLICY_REWARD_TOKEN", token)
    stranger = Stranger(port, token)
    stranger.start()
    mine = [f"run.dir={tmp_path}", "run.name=asked", f"reward.port={port}",
            f"reward.max_request_bytes={LIMIT}"]  # fmt: skip
    summary = train(prepare("bandit_ppo", [*COMMON, *mine]), "bandit_ppo")
    stranger.join(30)
    assert summary["status"] == "finished", summary["failure"]
    assert losses(tmp_path / "asked") == undisturbed

    assert len(stranger.answers) > 20
    assert all(given == expected for expected, given, _ in stranger.answers)
    assert max(seconds for *_, seconds in stranger.answers) < 1.0

    logs = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"
    text = "".join(p.read_text() for p in logs.glob("*reward-asked*Endpoint*"))
    assert abs(text.count(" refused 'POST': ") - len(stranger.answers)) <= len(stranger.requests)
    files = [path for path in (tmp_path / "asked").rglob("*") if path.is_file()]
    assert len(files) > 5 and token not in text
    assert not [path for path in files if token.encode() in path.read_bytes()]
