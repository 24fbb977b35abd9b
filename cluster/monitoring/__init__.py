"""Metrics for machines: Ray's agent, Prometheus, Grafana."""
