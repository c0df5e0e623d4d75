"""Means, intervals and paired differences over seeds and cases."""

import math

import numpy as np
import pytest
from scipy.stats import wilcoxon

from nnssl_adapt.studies.statistics import estimate, paired, with_holm


def values(seeds, cases, of):
    return {(seed, f"case{case}"): of(seed, case) for seed in range(seeds) for case in range(cases)}


def test_the_interval_of_one_seed_is_that_of_the_cases_mean():
    random = np.random.default_rng(0)
    sample = random.normal(0.7, 0.1, 60)
    found = estimate(values(1, 60, lambda seed, case: sample[case]))
    error = sample.std() / math.sqrt(60)
    assert found.mean == pytest.approx(sample.mean()) and (found.cases, found.seeds) == (60, 1)
    assert found.low == pytest.approx(sample.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(sample.mean() + 1.96 * error, abs=0.15 * error)


def test_seeds_that_differ_widen_the_interval():
    calm = estimate(values(4, 20, lambda seed, case: 0.01 * case))
    shaken = estimate(values(4, 20, lambda seed, case: 0.01 * case + 0.3 * (seed % 2)))
    assert shaken.high - shaken.low > 2 * (calm.high - calm.low)


def test_missing_values_are_left_out():
    found = estimate({**values(2, 6, lambda seed, case: 1.0 + case), (0, "case0"): math.nan, (1, "case0"): math.nan})
    assert found.cases == 5 and found.mean == 4
    assert math.isnan(estimate({(0, "a"): math.nan}).mean) and math.isnan(estimate({}).mean)


def test_few_cases_have_no_interval():
    found = estimate(values(3, 4, lambda seed, case: case))
    assert math.isnan(found.low) and found.mean == 1.5


def test_differences_are_paired_by_case_and_seed():
    hard = np.random.default_rng(1).uniform(0.2, 0.9, 12)
    reference = values(2, 12, lambda seed, case: hard[case])
    better = values(2, 12, lambda seed, case: hard[case] + 0.01 + 0.001 * case)
    better |= {(7, "case0"): 1.0}  # a seed that the reference lacks
    (found,) = with_holm([paired(better, reference)])
    assert found.estimate.mean == pytest.approx(0.01 + 0.001 * 5.5) and found.estimate.low > 0.01
    assert found.p == pytest.approx(wilcoxon([0.01 + 0.001 * case for case in range(12)]).pvalue)
    assert not found.within_noise
    assert paired(better, reference).within_noise  # without the correction it is no finding


def test_noise_is_called_noise():
    noise = np.random.default_rng(2).normal(0, 0.05, (2, 15))
    reference = values(2, 15, lambda seed, case: 0.5)
    other = values(2, 15, lambda seed, case: 0.5 + noise[seed, case])
    found = with_holm([paired(other, reference), paired(reference, reference)])
    assert all(difference.within_noise for difference in found)
    assert found[0].p_holm == pytest.approx(min(1, 2 * found[0].p))
