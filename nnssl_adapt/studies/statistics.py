"""Means over cases and seeds, differences to the reference arm, and how sure they are.

An arm's results are a matrix, seeds × cases. Both were drawn at random, so the bootstrap draws both again: seeds and cases,
with replacement. Differences are paired: the same case, the same seed, the same training cases. The test is Wilcoxon's
signed-rank test over cases (each the mean of its seeds), corrected by Holm over all comparisons of a metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nnssl_adapt.evaluation.compare import holm, signed_rank_p

_RESAMPLES = 10_000
_ENOUGH_CASES = 5

Values = Mapping[tuple[int, str], float]
"""(seed, case) → value; NaN where the case has none."""


@dataclass(frozen=True)
class Estimate:
    """A mean over cases and seeds.

    Attributes:
        mean: over all values that are there.
        low, high: 95% confidence interval; NaN for fewer than five cases.
        cases, seeds: that have a value.
    """

    mean: float
    low: float
    high: float
    cases: int
    seeds: int


@dataclass(frozen=True)
class PairedDifference:
    """An arm minus the reference arm.

    Attributes:
        estimate: of the difference.
        p: of Wilcoxon's signed-rank test over cases, two-sided; NaN for fewer than two.
        p_holm: corrected; see :func:`with_holm`.
    """

    estimate: Estimate
    p: float
    p_holm: float = math.nan

    @property
    def within_noise(self) -> bool:
        """Whether the interval has 0 or is not known, or the corrected p is 0.05 or more: such a difference is no finding."""
        return not (self.estimate.low > 0 or self.estimate.high < 0) or not self.p_holm < 0.05


def estimate(values: Values, seed: int = 0) -> Estimate:
    """The mean of all values and its interval. ``seed``: of the bootstrap."""
    matrix = _matrix(values)
    if not np.isfinite(matrix).any():
        return Estimate(math.nan, math.nan, math.nan, 0, 0)
    there = np.isfinite(matrix)
    low, high = _interval(matrix, seed)
    return Estimate(float(np.nanmean(matrix)), low, high, int(there.any(0).sum()), int(there.any(1).sum()))


def paired(values: Values, reference: Values, seed: int = 0) -> PairedDifference:
    """``values`` minus ``reference``, on the (seed, case) pairs that both have."""
    common = {key: values[key] - reference[key] for key in values if key in reference}
    found = estimate(common, seed)
    matrix = _matrix(common)
    per_case = np.array([np.nanmean(column) for column in matrix.T if np.isfinite(column).any()])
    return PairedDifference(found, signed_rank_p(per_case))


def with_holm(differences: Sequence[PairedDifference]) -> list[PairedDifference]:
    """The same, with p corrected for how many there are."""
    corrected = holm([difference.p for difference in differences])
    return [replace(difference, p_holm=p) for difference, p in zip(differences, corrected, strict=True)]


def _matrix(values: Values) -> np.ndarray:
    """float64 (seeds, cases), NaN where there is no value."""
    seeds, cases = sorted({seed for seed, _ in values}), sorted({case for _, case in values})
    matrix = np.full((len(seeds), len(cases)), math.nan)
    for (seed, case), value in values.items():
        matrix[seeds.index(seed), cases.index(case)] = value
    return matrix


def _interval(matrix: np.ndarray, seed: int) -> tuple[float, float]:
    """Percentile interval of the mean, seeds and cases drawn again. A single seed says nothing about seeds."""
    matrix = matrix[:, np.isfinite(matrix).any(0)]
    rows, columns = matrix.shape
    if columns < _ENOUGH_CASES:
        return math.nan, math.nan
    random = np.random.default_rng(seed)
    weights_of_seeds = random.multinomial(rows, np.full(rows, 1 / rows), size=_RESAMPLES).astype(np.float64)
    weights_of_cases = random.multinomial(columns, np.full(columns, 1 / columns), size=_RESAMPLES).astype(np.float64)
    there = np.isfinite(matrix)
    filled = np.where(there, matrix, 0.0)
    sums = np.einsum("ns,sc,nc->n", weights_of_seeds, filled, weights_of_cases, optimize=True)
    counts = np.einsum("ns,sc,nc->n", weights_of_seeds, there.astype(np.float64), weights_of_cases, optimize=True)
    means = sums[counts > 0] / counts[counts > 0]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
