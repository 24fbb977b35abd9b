"""Who runs a study's trials, one after another: a driver in a process of its own."""

from cluster.crew import Crew
from cluster.restarts import reason
from cluster.train import train
from configs.schema import Config


class TrialRunner:
    """Runs as a Ray actor. Its crew, learner, actors, evaluator and reward services, goes from
    trial to trial; only the queue's process is each run's own."""

    def __init__(self) -> None:
        self.crew = Crew(keep=True)

    def run(self, config: Config, preset: str) -> str:
        """Run a trial to its end; returns why it failed, empty where it did not."""
        try:
            summary = train(config, preset, self.crew)
            failure = "" if summary["status"] == "finished" else summary["failure"]
        except Exception as error:
            failure = reason(error)
        if failure:
            self.crew.end()
        return failure or ""

    def end(self) -> None:
        """End the crew."""
        self.crew.end()
