"""How long rewards take, observed where they are asked for: in each rollout actor."""

import time

from ray.util.metrics import Histogram

from actors.actor import RewardClient, Scores
from cluster.metrics import METRICS, Form
from cluster.monitoring.exporter import HELP, PREFIX
from configs.schema import Config

SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]


class TimedRewards:
    """`actors.actor.RewardClient` with a clock. labels: `run` and `actor`."""

    def __init__(self, client: RewardClient, run: str, actor: int) -> None:
        self.client = client
        labels = {"run": run, "actor": str(actor)}
        (metric,) = (m for m in METRICS if m.form is Form.LATENCY)
        series = Histogram(PREFIX + metric.name, HELP, SECONDS, tuple(labels))
        self._latency = series.set_default_tags(labels)

    def score(
        self, prompts: list[list[int]], responses: list[list[int]], timeout_s: float
    ) -> Scores:
        """As the client does."""
        started = time.perf_counter()
        try:
            return self.client.score(prompts, responses, timeout_s)
        finally:
            self._latency.observe(time.perf_counter() - started)


def timed(client: RewardClient, config: Config, actor: int) -> RewardClient:
    """The client of a rollout actor, timed where the run exports metrics."""
    if not config.cluster.metrics_seconds:
        return client
    return TimedRewards(client, config.run.name, actor)
