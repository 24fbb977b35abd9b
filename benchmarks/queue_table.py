"""What `benchmarks.queue` prints."""

import statistics
from typing import Any

from benchmarks.results import ratios, spread


def rate_table(rows: list[dict[str, Any]]) -> str:
    """Rollouts a second: medians (and ranges) over the turns, and ratios turn by turn; CPU: of all
    threads of the store's process a rollout; within: of that, in the queue's own methods; asyncio:
    the list in an asyncio actor, as our queue is one."""
    return "\n".join(line for row in rows for line in _row(row))


def _row(row: dict[str, Any]) -> list[str]:
    producers = f", {row['producers']} producers" if "producers" in row else ""
    lines = [f"{row['do']}, {row['tokens']} tokens, {row['lease']} groups a put{producers}"]
    for side in ("ours", "list", "asyncio", "reverb"):
        if side not in row:
            continue
        line = f"  {side:>7}: {spread(row[side], 0)}"
        if "cpu_us" in row and side in row["cpu_us"]:
            line += f"; CPU {statistics.median(row['cpu_us'][side]):.1f} us"
        if side == "ours":
            parts = (f"{name} {us:.1f}" for name, us in row["within_us"].items())
            line += f"; within: {', '.join(parts)} us"
        lines.append(line)
    for side in ("list", "asyncio", "reverb"):
        if side in row:
            lines.append(f"  ours / {side} = {spread(ratios(row['ours'], row[side]))}")
    return lines


def held_table(rows: list[dict[str, Any]], memory: dict[str, float]) -> str:
    """Rates of ours by how much it holds, over those of the first; and memory over bytes."""
    lines = [
        f"memory of {memory['rollouts']:,} rollouts that came through Ray, over their bytes "
        f"({memory['bytes']:.0f} a rollout) = {memory['ratio']:.2f}"
    ]
    for row in rows:
        lines.append(f"{row['held']:,} held: memory {row['memory']:.2f} of the bytes")
        for do in ("insert", "sample"):
            against = spread(ratios(row[do], rows[0][do]))
            lines.append(f"  {do}: {spread(row[do], 0)}; over {rows[0]['held']:,} held: {against}")
    return "\n".join(lines)
