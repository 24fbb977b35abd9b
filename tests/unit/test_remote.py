"""A process of a run starts with the priority that its part has."""

import subprocess
import sys

SCRIPT = """
import os
from cluster.remote import Host
before = os.nice(0)
host = Host("collections:Counter", "aab", nice=2)
print(os.nice(0) - min(before, 17), host.call("most_common", 1)[0][0])
"""


def test_a_process_that_can_wait_has_a_lower_priority():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["2", "a"]
