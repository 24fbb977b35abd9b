"""The one error that settings raise."""


class ConfigError(ValueError):
    """A setting that cannot be used: which one, its value, what is wrong and what to do instead.

    Its text is a single line. key: full dotted name, e.g. `learner.lr`, or a preset.
    """

    def __init__(self, key: str, value: object, problem: str, fix: str) -> None:
        super().__init__(key, value, problem, fix)
        self.key, self.value, self.problem, self.fix = key, value, problem, fix

    def __str__(self) -> str:
        return f"{one_line(self.key)}={shown(self.value)}: {self.problem}; {self.fix}"


def shown(value: object) -> str:
    """A setting's value as a person would write it."""
    name = getattr(value, "name", None)  # of an Enum
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return one_line(name if isinstance(name, str) else str(value))


def one_line(text: str, limit: int = 200) -> str:
    """The text without line breaks or control characters, cut to `limit` characters."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
