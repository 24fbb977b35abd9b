"""Typed settings and presets. Imports nothing of ours; every other package may import it."""
