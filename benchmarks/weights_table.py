"""The tables that `benchmarks.weights` prints."""

from typing import Any

MEANING = (
    "an update: from the learner's read-out until the last engine may generate again; clone: the "
    "same weights into fresh memory, in turns with it; medians (and ranges). The first update, "
    "which touches memory for the first time, is apart. The limit is, for one idle engine, for "
    "(update - 40 ms) / clone; for several at once, for their update / that of one; for one that "
    "generates, for the stall / the update (n of so many times with tokens of both versions)"
)
STALL_MEANING = (
    "stall: the scheduler stands still; silent: the longest time without a token around the "
    "update, caches computed anew included; step: the usual time between tokens"
)
STALLS = ("stall", "silent", "step")


def update_table(rows: list[dict[str, Any]]) -> str:
    """A line per size, engine and what it does; below where the time went and the stalls, in ms."""
    costs = [
        (
            row["size"], f"{row['parameters'] / 1e6:.1f}M", _engine(row),
            _range(row["clone_ms"], row["clone_all_ms"]),
            _range(row["update_ms"], row["update_all_ms"]), f"{row['first_ms']:.0f}",
            f"{row['ratio']:.2f}", f"{row['share']:.2f}", f"{row['limit']:g}",
            "within" if row["within"] else "OVER",
        )
        for row in rows
    ]  # fmt: skip
    head = ("size", "numbers", "engine", "clone ms", "update ms", "first ms", "ratio", "measure",
            "limit", "verdict")  # fmt: skip
    names = list(dict.fromkeys(name for row in rows for name in row["parts_ms"]))
    parts = [
        (row["size"], _engine(row), *(_ms(row["parts_ms"].get(name)) for name in names))
        for row in rows
    ]
    stalls = [
        (row["size"], _engine(row), *(_ms(row[f"{name}_ms"]) for name in STALLS))
        for row in rows
        if row["generating"]
    ]
    lines = ["", *_lines([head, *costs]), MEANING, "", "where an update's time goes, ms:"]
    lines += _lines([("size", "engine", *names), *parts])
    if stalls:
        lines += ["", *_lines([("size", "engine", *(f"{name} ms" for name in STALLS)), *stalls])]
        lines += [STALL_MEANING]
    return "\n".join(lines)


def generation_table(rows: list[dict[str, Any]]) -> str:
    """A line per engine and number of actors."""
    head = ("engine", "actors", "rollouts/s", "tokens/s", "start s, each")
    cells = [
        (
            row["engine"], str(row["actors"]), f"{row['rollouts_per_s']:.1f}",
            f"{row['tokens_per_s']:,.0f}", " ".join(f"{s:.0f}" for s in row["start_seconds"]),
        )
        for row in rows
    ]  # fmt: skip
    title = f"generation, {rows[0]['size']}, one thread per actor unless set otherwise:"
    return "\n".join(["", title, *_lines([head, *cells])])


def _engine(row: dict[str, Any]) -> str:
    if not row["generating"]:
        return row["engine"] if row["actors"] == 1 else f"{row['engine']}, {row['actors']} actors"
    return f"{row['engine']}, generating ({row['in_flight']} of {len(row['update_all_ms'])})"


def _range(middle: float, every: list[float]) -> str:
    return f"{middle:.1f} ({min(every):.1f}-{max(every):.1f})"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _lines(cells: list[tuple[str, ...]]) -> list[str]:
    """Columns aligned; the engine's to the left, as the first."""
    widths = [max(len(row[place]) for row in cells) for place in range(len(cells[0]))]
    left = {place for place, name in enumerate(cells[0]) if name in ("size", "engine")}
    return [
        "  ".join(
            text.ljust(width) if place in left else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in cells
    ]
