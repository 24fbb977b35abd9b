"""Benchmarks: ours beside a named baseline, alternately, in one run. `python -m cluster bench`."""
