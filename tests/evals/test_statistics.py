"""Paired statistics against values worked out by hand."""

import numpy as np
import pytest

from hf_paged_evals.runner.statistics import PairedOutcomes, bootstrap_mean, bootstrap_ratio, proportion


@pytest.mark.parametrize(
    "discordant, expected",
    [((0, 0), 1.0), ((5, 5), 1.0), ((1, 9), 2 * 11 / 1024), ((9, 1), 2 * 11 / 1024), ((0, 6), 2 / 64)],
)
def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs(discordant, expected):
    assert PairedOutcomes(50, *discordant, 50).p_value() == pytest.approx(expected)


def test_outcomes_are_counted_pair_by_pair():
    outcomes = PairedOutcomes.count([True, True, True, False, False], [True, False, True, True, False])
    assert outcomes == PairedOutcomes(both=2, only_first=1, only_second=1, neither=1)
    assert (outcomes.first.value, outcomes.second.value) == (0.6, 0.6)


def test_a_difference_has_a_width_even_where_all_samples_agree():
    change = PairedOutcomes(3, 0, 0, 161).difference()
    # Bonett and Price: (1 + 1) / 166 / 166 under the root.
    assert change.value == 0 and change.half_width == pytest.approx(1.96 * (2 / 166 / 166) ** 0.5, rel=1e-3)
    assert change.contains_zero


def test_a_difference_that_is_there_excludes_zero():
    change = PairedOutcomes(40, 2, 20, 38).difference()
    assert change.value == pytest.approx(0.18) and change.low > 0.05 and change.high < 0.3
    assert PairedOutcomes(40, 20, 2, 38).difference().high < -0.05


def test_wilson_at_the_ends():
    # At 100 % the lower end is n / (n + z²).
    assert proportion(164, 164).low == pytest.approx(164 / (164 + 3.8415), rel=1e-4)
    assert proportion(164, 164).high == 1.0
    assert proportion(0, 10).low == 0.0 and proportion(0, 10).high == pytest.approx(3.8415 / 13.8415, rel=1e-4)


def test_the_bootstrap_of_a_mean_is_as_wide_as_theory_says():
    values = np.random.default_rng(1).normal(2.0, 3.0, size=400)
    found = bootstrap_mean(list(values))
    assert found.value == pytest.approx(values.mean())
    assert found.half_width == pytest.approx(1.96 * values.std() / 20, rel=0.05)
    assert found == bootstrap_mean(list(values)), "the same seed, the same interval"


def test_the_bootstrap_of_a_ratio_weighs_its_samples():
    found = bootstrap_ratio([1.0, 30.0], [1.0, 10.0])
    assert found.value == pytest.approx(31 / 11) and (found.low, found.high) == (1.0, 3.0)


@pytest.mark.parametrize("call", [lambda: proportion(0, 0), lambda: bootstrap_mean([])])
def test_no_samples_are_refused(call):
    with pytest.raises(ValueError, match="statistics of no samples: raise --limit"):
        call()


def test_outcomes_must_be_paired():
    with pytest.raises(ValueError, match="paired outcomes must be as many: 2 and 1"):
        PairedOutcomes.count([True, False], [True])
