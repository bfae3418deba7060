"""The exceptions that bad input raises, and the sentence that suggests the right name for an unknown one.

What lives elsewhere: every check, beside the input that it checks.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

SHOWN = 20  # problems that a message lists; the others are counted


class ConfigError(ValueError):
    """A configuration that cannot be used: the message names the key, what came and what was expected."""


class ManifestError(ValueError):
    """Bad rows: the message has a line for each, with file, line number and column."""

    def __init__(self, problems: Sequence[str]) -> None:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        super().__init__("\n".join([*problems[:SHOWN], *more]))
        self.problems = list(problems)

    def __reduce__(self) -> tuple[type[ManifestError], tuple[list[str]]]:
        """Travel to another process with all problems."""
        return type(self), (self.problems,)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, is of another configuration, or whose training is not done."""


class PrepareError(RuntimeError):
    """Data that cannot be fetched, or is not in the folder that was named."""


class RankError(RuntimeError):
    """One of several processes has ended: the message names it; empty if another process says it."""


def near(name: str, known: Iterable[str]) -> str | None:
    """Return the nearest known name, None if none is near."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)), None)


def unknown(category: str, name: str, known: Iterable[object]) -> str:
    """Return the message for an unknown name: its category, the nearest known name, and all known names.

    Examples
    --------
    >>> unknown("layer", "LowRankFusin", ["LowRankFusion", "MLB"])
    "unknown layer 'LowRankFusin'; did you mean 'LowRankFusion'? There are: LowRankFusion, MLB"
    """
    names = [str(name) for name in known]
    guess = f"did you mean {found!r}? " if (found := near(name, names)) else ""
    return f"unknown {category} {name!r}; {guess}There are: {', '.join(names) or 'none'}"
