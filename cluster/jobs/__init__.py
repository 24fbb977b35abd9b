"""Submitting runs to a Ray cluster, and manifests of clusters to submit them to."""
