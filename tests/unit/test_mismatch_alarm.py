"""The alarm of law 3: said once, counted at every step."""

from types import SimpleNamespace

from cluster.books import Books
from tests.harness import settings


def test_the_alarm_is_said_once_and_counted():
    said: list[str] = []
    books = SimpleNamespace(
        config=settings("bandit"),
        tally=SimpleNamespace(mismatches=0),
        say=said.append,
    )
    for step, kl in enumerate([1e-9, 0.02, None, 0.03]):
        line = {"step": step} | ({} if kl is None else {"engine_mismatch_kl": kl})
        Books._check_mismatch(books, line)
    assert line["engine_mismatch_alarms_total"] == 2
    (message,) = said
    assert message.startswith(
        "WEIGHTS DID NOT ARRIVE: engine_mismatch_kl 0.02 nats/token at step 1"
    )
