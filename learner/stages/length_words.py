"""The words of the length problems: six topics, and the openers that count a response's clauses."""

OPENERS = [
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
    "thirteenth",
    "fourteenth",
    "fifteenth",
    "sixteenth",
    "seventeenth",
    "eighteenth",
    "nineteenth",
    "twentieth",
]
INSTRUCTIONS = [
    "summarise",
    "name",
    "outline",
    "explain",
    "describe",
    "discuss",
    "narrate",
    "elaborate",
]
FIXED = ["please", "the", ":"]

ADJECTIVES, NOUNS, VERBS, ADVERBS = range(4)

TOPICS: tuple[tuple[list[str], ...], ...] = tuple(
    tuple(words.split() for words in kinds)
    for kinds in (
        (
            "deep calm wide cold salty stormy blue hidden",
            "river ocean harbour wave island lake boat sailor",
            "flows drifts floods floats sinks sails rises shimmers",
            "slowly endlessly quietly northward gently westward downward swiftly",
        ),
        (
            "green tall wild leafy fragrant ancient shady mossy",
            "forest garden meadow oak flower fern orchard gardener",
            "grows blooms spreads withers ripens sways flourishes sheds",
            "yearly silently upward abundantly lushly freely early densely",
        ),
        (
            "busy bright crowded modern noisy narrow grand dusty",
            "city street market tower bridge station museum merchant",
            "bustles glows trades opens closes builds gathers welcomes",
            "daily nightly loudly proudly openly hourly restlessly publicly",
        ),
        (
            "warm fresh sweet spicy golden crisp salted rich",
            "bread soup kitchen pepper honey apple baker feast",
            "simmers bakes melts cools tastes nourishes crumbles boils",
            "thoroughly evenly briskly lightly deliciously carefully tenderly plainly",
        ),
        (
            "curious precise clever exact faint bold early novel",
            "theory signal number planet lens proof experiment scholar",
            "predicts measures shows orbits refutes suggests converges explains",
            "exactly rigorously rarely clearly roughly formally newly elegantly",
        ),
        (
            "soft tuneful solemn lively tender brave old sudden",
            "song drum dancer violin story poem stage singer",
            "echoes sings moves begins ends repeats charms rhymes",
            "softly merrily sadly nobly together alone forever again",
        ),
    )
)


def vocabulary() -> list[str]:
    """Every word once, in the order of first appearance."""
    topics = [word for kinds in TOPICS for words in kinds for word in words]
    return list(dict.fromkeys([*FIXED, *INSTRUCTIONS, *OPENERS, *topics]))
