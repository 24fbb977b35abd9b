"""Says at the end how many inputs the fuzz tests tried, when they tried more than usual."""

from typing import Any

from tests import fuzz


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if fuzz.SCALE == 1 or not fuzz.COUNTS:
        return
    terminalreporter.section("fuzzed inputs")
    for target, count in sorted(fuzz.COUNTS.items()):
        terminalreporter.write_line(f"{count:>9,}  {target}")
    terminalreporter.write_line(f"{fuzz.COUNTS.total():>9,}  in all, FUZZ_SCALE={fuzz.SCALE}")
