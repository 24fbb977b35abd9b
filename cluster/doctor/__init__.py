"""What keeps a machine from running a preset, and what a preset needs."""
