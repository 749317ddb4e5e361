"""Durations in bounded memory: where a value goes, and what percentiles are worth."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.histogram import BINS, Histogram, Percentiles, bin_edges, bin_of

WORDS = st.integers(0, (1 << 64) - 1)


def histogram(*values: int) -> Histogram:
    made = Histogram()
    made.add(np.array(values, np.uint64))
    return made


def test_of_nothing_there_is_nothing_to_say():
    empty = Histogram()
    empty.add(np.zeros(0, np.uint64))
    assert empty.percentiles() == Percentiles(0, None, None, None, None)
    assert empty.percentile(0.5) == 0


@given(WORDS)
def test_a_value_lies_within_the_bounds_of_its_bin(value):
    edges = bin_edges()
    at = int(bin_of(np.array([value], np.uint64))[0])
    assert int(edges[at]) <= value < int(edges[at + 1])
    assert int(edges[at + 1]) - int(edges[at]) <= max(1, value // 128)


def test_the_last_word_has_the_last_bin():
    assert bin_of(np.array([0, 255, (1 << 64) - 1], np.uint64)).tolist() == [0, 255, BINS - 1]


@given(st.lists(WORDS, min_size=1, max_size=300), st.floats(0, 1))
def test_a_percentile_is_within_half_a_bin(values, share):
    # GIVEN the exact one: the least value that this share of all does not exceed
    rank = max(1, int(np.ceil(share * len(values))))
    exact = sorted(values)[rank - 1]
    # THEN
    found = histogram(*values).percentile(share)
    assert abs(found - exact) <= exact / 128 + 1
    assert min(values) <= found <= max(values)


def test_small_values_are_exact():
    assert histogram(*range(200)).percentile(0.5) == 99


def test_few_values_have_no_far_percentiles():
    nine = histogram(*range(1, 10)).percentiles()
    assert (nine.p50, nine.p90, nine.p99, nine.max) == (5, None, None, 9)
    ten = histogram(*range(1, 11)).percentiles()
    assert (ten.p90, ten.p99) == (9, None)
    assert histogram(*range(1, 101)).percentiles().p99 == 99


def test_the_longest_is_exact_however_long():
    assert histogram(7, 123_456_789_012).percentiles().max == 123_456_789_012


def test_adding_in_parts_is_adding_at_once():
    whole, parts = histogram(5, 70_000, 3), histogram(5)
    parts.add(np.array([70_000], np.uint64))
    parts.add(np.array([3], np.uint64))
    assert (whole.counts == parts.counts).all()
    assert (whole.n, whole.min, whole.max) == (parts.n, parts.min, parts.max) == (3, 3, 70_000)


@pytest.mark.parametrize("ns", [39_999, 40_001])
def test_one_value_is_its_own_percentile(ns):
    assert histogram(ns).percentiles() == Percentiles(1, ns, None, None, ns)
