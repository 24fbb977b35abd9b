"""Wires it all: entry points, the training run, metrics, evaluation, reports, benchmarks."""
