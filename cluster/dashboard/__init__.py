"""The live page: `python -m cluster dashboard` follows runs, and compares them, in a browser."""
