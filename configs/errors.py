"""The one error that settings raise."""

LIMIT = 400  # characters of an error's line


class ConfigError(ValueError):
    """A setting that cannot be used: which one, its value, what is wrong and what to do instead.

    Its text is a single line of at most LIMIT characters, whatever the settings hold. key: full
    dotted name, e.g. `learner.lr`, or a preset.
    """

    def __init__(self, key: str, value: object, problem: str, fix: str) -> None:
        super().__init__(key, value, problem, fix)
        self.key, self.value, self.problem, self.fix = key, value, problem, fix

    def __str__(self) -> str:
        why = f": {one_line(self.problem, 160)}; {one_line(self.fix, 160)}"
        start = f"{one_line(self.key, 40)}="
        return start + shown(self.value, min(200, LIMIT - len(start) - len(why))) + why


def shown(value: object, limit: int = 200) -> str:
    """A setting's value as a person would write it, cut to `limit` characters."""
    name = getattr(value, "name", None)  # of an Enum
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    try:
        return one_line(name if isinstance(name, str) else str(value), limit)
    except (ValueError, RecursionError):  # thousands of digits, or lists in lists
        return f"{type(value).__name__} too large to show"[:limit]


def one_line(text: str, limit: int = 200) -> str:
    """The text without line breaks or control characters, cut to `limit` characters."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
