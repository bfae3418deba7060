"""Which of two models is better, by how much, and whether that is certain: intervals and paired tests.

What lives here: the interval of a metric over seeds; the difference of two models over the rows, which says what other rows
would give, and over the seeds, which says what another training would give. What lives elsewhere: each row's score
(``evaluate.py``), the sentences (``report.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, bootstrap, norm, permutation_test
from scipy.stats import t as student

LEVEL = 0.95
RESAMPLED = 2000
MANY = 1000  # units of rows from which the normal distribution takes the place of resampling
_INFINITE = (-np.inf, np.inf)


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95% interval; None where nothing says how wide it is."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def known(self) -> bool:
        """Whether there are ends."""
        return self.low is not None

    def written(self, places: int = 3, sign: str = "") -> tuple[str, str]:
        """Return the mean, and ``± half`` where the ends are as far from it, else ``low to high``, as text.

        Examples
        --------
        >>> Interval(0.5, 0.25, 0.75).written(), Interval(0.9, 0.5, 1.0).written(1)
        (('0.500', '± 0.250'), ('0.9', '0.5 to 1.0'))
        """
        mean = f"{self.mean:{sign}.{places}f}"
        if self.low is None or self.high is None:
            return mean, ""
        below, above = self.mean - self.low, self.high - self.mean
        if abs(below - above) <= 1e-9 * (below + above):
            return mean, f"± {above:.{places}f}"
        return mean, f"{self.low:{sign}.{places}f} to {self.high:{sign}.{places}f}"

    def __str__(self) -> str:
        mean, ends = self.written()
        return f"{mean} {ends}" if ends.startswith("±") else f"{mean} ({ends})" if ends else mean


def interval(values: Sequence[float], bounds: tuple[float, float] = _INFINITE) -> Interval:
    """Return the mean of one value per seed, and its interval by Student's t, cut off at the metric's bounds.

    Examples
    --------
    >>> str(interval([0.5, 0.6, 0.7])), str(interval([0.5])), str(interval([0.8, 1.0], (0, 1)))
    ('0.600 ± 0.248', '0.500', '0.900 (0.000 to 1.000)')
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean)
    half = _half(values, 1 / len(values))
    return Interval(mean, max(bounds[0], mean - half), min(bounds[1], mean + half))


def _half(values: Sequence[float], variance: float) -> float:
    """Return the half width of an interval whose mean has this multiple of the values' variance."""
    spread = float(np.std(values, ddof=1)) * variance**0.5
    return float(student.ppf((1 + LEVEL) / 2, len(values) - 1)) * spread


@dataclass(frozen=True)
class Effect:
    """An interval of a difference, and the probability of one as large if there were none."""

    interval: Interval
    p: float

    @property
    def certain(self) -> bool:
        """Whether chance alone makes so large a difference less often than once in twenty times."""
        return self.p < 1 - LEVEL


@dataclass(frozen=True)
class Difference:
    """How much better one model is than another, negative if it is worse; `seeds` is None for one seed."""

    mean: float
    rows: Effect
    seeds: Effect | None

    @property
    def certain(self) -> bool:
        """Whether neither other rows nor, as far as there are several seeds, another training would turn it round."""
        return self.rows.certain and (self.seeds is None or self.seeds.certain)


def difference(
    ours: Sequence[np.ndarray],
    theirs: Sequence[np.ndarray],
    units: Sequence[np.ndarray],
    overlap: float | None = None,
) -> Difference:
    """Compare two models whose metric is the mean of their rows' scores, of which more is better.

    Parameters
    ----------
    ours, theirs : sequence of ndarray
        For each seed the scores of its rows, ``(N,)``.
    units : sequence of ndarray
        For each seed the number of each row's unit, ``(N,)``: rows of one unit (a group, or the same row with several
        seeds) are not independent of each other, and are drawn together.
    overlap : float, optional
        If each seed draws its split: the ratio of its test rows to its training rows.

    Notes
    -----
    Over rows: the interval is a bootstrap of the units. The test is McNemar's exact one where there is one seed, a unit is
    a row and scores are 0 and 1; otherwise the units' signs are flipped. From `MANY` units on, both are the normal
    distribution's.
    Over seeds: a paired t-test. Trainings on splits that overlap are not independent: their variance is
    ``1 / S + overlap`` of a seed's, in place of ``1 / S``.

    References
    ----------
    Q. McNemar, "Note on the sampling error of the difference between correlated proportions or percentages", Psychometrika
    12, 1947. C. Nadeau and Y. Bengio, "Inference for the Generalization Error", Machine Learning 52, 2003, section 3.2.

    Examples
    --------
    >>> right, wrong, rows = np.ones(100), np.zeros(100), np.arange(100)
    >>> found = difference([np.where(rows < 90, right, wrong)], [np.where(rows < 10, right, wrong)], [rows])
    >>> f"{found.mean:.2f}", str(found.rows.interval), found.certain
    ('0.80', '0.800 (0.720 to 0.870)', True)
    """
    by_seed = [a - b for a, b in zip(ours, theirs, strict=True)]
    means = [float(d.mean()) for d in by_seed]
    seeds = None if len(means) < 2 else _over_seeds(means, overlap or 0.0)
    return Difference(float(np.mean(means)), _over_rows(by_seed, units), seeds)


def _over_seeds(means: Sequence[float], overlap: float) -> Effect:
    mean, variance = float(np.mean(means)), 1 / len(means) + overlap
    half = _half(means, variance)
    error = half / float(student.ppf((1 + LEVEL) / 2, len(means) - 1))
    p = 2 * float(student.sf(abs(mean) / error, len(means) - 1)) if error > 0 else float(mean == 0)
    return Effect(Interval(mean, mean - half, mean + half), p)


def _over_rows(by_seed: Sequence[np.ndarray], units: Sequence[np.ndarray]) -> Effect:
    _, number = np.unique(np.concatenate(units), return_inverse=True)
    # Each seed has the same weight, however many rows it has.
    weight = np.concatenate([np.full(len(d), 1 / len(d) / len(by_seed)) for d in by_seed])
    sums = np.bincount(number, weight * np.concatenate(by_seed))
    weights = np.bincount(number, weight)
    mean = float(sums.sum())
    if not sums.any():  # no row tells the models apart, and so none says how far apart they may be
        return Effect(Interval(0.0), 1.0)
    if len(sums) > MANY:
        error = _error(sums, weights)
        half = float(norm.ppf((1 + LEVEL) / 2)) * error
        return Effect(Interval(mean, mean - half, mean + half), 2 * float(norm.sf(abs(mean) / error)))
    if len(sums) < 2:
        return Effect(Interval(mean), 1.0)
    rng = np.random.default_rng(0)
    drawn = bootstrap(
        (sums, weights),
        lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=LEVEL,
        n_resamples=RESAMPLED,
        batch=200,
        random_state=rng,
    ).confidence_interval
    if len(by_seed) == 1 and len(sums) == len(by_seed[0]) and np.isin(by_seed[0], (-1, 0, 1)).all():
        won, lost = int((sums > 0).sum()), int((sums < 0).sum())
        p = binomtest(won, won + lost).pvalue
    else:
        p = permutation_test(
            (sums,),
            np.sum,
            permutation_type="samples",
            vectorized=True,
            n_resamples=RESAMPLED,
            batch=200,
            random_state=rng,
        ).pvalue
    return Effect(Interval(mean, float(drawn.low), float(drawn.high)), float(p))


def _error(sums: np.ndarray, weights: np.ndarray) -> float:
    """Return the standard error of ``sums.sum()``, a mean to which each unit adds its part, and has its share of 1."""
    return float(np.sqrt(np.square(sums - sums.sum() * weights).sum()))


def clearly_less(ours: np.ndarray, theirs: np.ndarray, units: np.ndarray) -> bool:
    """Tell whether our losses (N,) are less than those of a simpler model on the same rows, by over a standard error.

    Rows of one unit (N,) count as one.

    References
    ----------
    The one-standard-error rule, the simplest model whose loss is within one standard error of the least: L. Breiman,
    J. Friedman, R. Olshen and C. Stone, "Classification and Regression Trees", 1984, section 3.4.3; here the error is that
    of the paired difference.

    Examples
    --------
    >>> ours, theirs = np.array([0.1, 0.2, 0.4, 0.4]), np.array([0.6, 0.7, 0.1, 0.5])
    >>> clearly_less(ours, theirs, np.arange(4)), clearly_less(ours, theirs, np.array([0, 0, 1, 1]))
    (True, False)
    """
    _, number = np.unique(units, return_inverse=True)
    sums = np.bincount(number, (theirs - ours) / len(units))
    return len(sums) > 1 and bool(sums.sum() > _error(sums, np.bincount(number) / len(units)))
