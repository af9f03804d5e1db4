"""Places in concepts, and ratios with errors over documents, against plain loops and known distributions."""

import math

import numpy as np
import pytest

from dlcm.concept_statistics import (
    RELATIVE_BINS,
    SHORTEST_RELATIVE,
    Places,
    grouped_ratio,
    loss_by_place,
    places_in_concepts,
    tokens_per_concept_by,
)
from dlcm.inside_validation import stride_for


def test_ratios_and_their_errors_are_those_of_the_formula_written_out():
    rng = np.random.default_rng(0)
    n, n_groups = 400, 4
    y, x = rng.normal(2, 1, n), rng.integers(0, 2, n).astype(float)
    group, document = rng.integers(-1, n_groups, n), rng.integers(0, 13, n)
    found = grouped_ratio(y, x, group, document, n_groups)
    for g in range(n_groups):
        sums = {}
        for i in range(n):
            if group[i] == g:
                a, b = sums.get(document[i], (0.0, 0.0))
                sums[document[i]] = (a + y[i], b + x[i])
        ratio = sum(a for a, _ in sums.values()) / sum(b for _, b in sums.values())
        squares = sum((a - ratio * b) ** 2 for a, b in sums.values())
        error = math.sqrt(squares * len(sums) / (len(sums) - 1)) / sum(b for _, b in sums.values())
        assert found.value[g] == pytest.approx(ratio, rel=1e-12)
        assert found.stderr[g] == pytest.approx(error, rel=1e-12)
        assert (found.n_tokens[g], found.n_documents[g]) == ((group == g).sum(), len(sums))


def test_with_one_token_a_document_the_error_is_that_of_a_mean():
    values = np.random.default_rng(1).normal(size=50)
    found = loss_by_place(values, np.zeros(50, int), np.arange(50), 1)
    assert found.value[0] == pytest.approx(values.mean())
    assert found.stderr[0] == pytest.approx(values.std(ddof=1) / math.sqrt(50))


def test_the_error_knows_that_tokens_of_one_document_are_alike():
    """Documents with a mean of their own: deviations over errors are standard normal; an error over tokens is far too small."""
    rng, deviations, naive = np.random.default_rng(2), [], []
    for _ in range(300):
        lengths = rng.integers(5, 60, 40)
        document = np.repeat(np.arange(40), lengths)
        losses = 3.0 + rng.normal(0, 1, 40)[document] + rng.normal(0, 1, len(document))
        found = loss_by_place(losses, np.zeros(len(document), int), document, 1)
        deviations.append((found.value[0] - 3.0) / found.stderr[0])
        naive.append((found.value[0] - 3.0) / (losses.std() / math.sqrt(len(losses))))
    assert 0.85 < np.std(deviations) < 1.2
    assert np.std(naive) > 3


def test_a_group_of_one_document_has_no_error_and_an_empty_group_no_value():
    found = loss_by_place(np.array([1.0, 2.0, 3.0]), np.array([0, 0, 1]), np.array([0, 1, 1]), 3)
    rows = found.rows()
    assert rows[0]["value"] == 1.5
    assert rows[0]["stderr"] is not None
    assert (rows[1]["value"], rows[1]["stderr"]) == (3.0, None)
    assert rows[2] == {"value": None, "stderr": None, "n_tokens": 0, "n_documents": 0}


def test_tokens_that_were_not_predicted_count_nowhere_and_far_places_with_the_last():
    found = loss_by_place(np.array([np.nan, 1.0, 2.0, 5.0]), np.array([0, 0, 3, 9]), np.array([0, 0, 1, 1]), 3)
    assert found.value.tolist()[::2] == [1.0, 3.5]
    assert found.n_tokens.tolist() == [1, 0, 2]


def test_tokens_per_concept_are_the_tokens_of_a_label_over_the_concepts_that_begin_in_it():
    labels = np.array([0, 0, 0, 1, 1, 1, 1, 0])
    begins = np.array([True, False, True, False, True, False, False, False])
    assert tokens_per_concept_by(labels, begins, np.arange(8), 2).value.tolist() == [2.0, 4.0]


def slow_places(begins, bounds, opens, closes):
    """One token after the other: (offset, length), -1 where it cannot be known."""
    found = []
    for s, (start, end) in enumerate(zip(bounds, bounds[1:])):
        firsts = [t for t in range(start, end) if begins[t]]
        for t in range(start, end):
            own = max(f for f in firsts if f <= t)
            behind = min((f for f in firsts if f > t), default=end)
            unknown = own == start and not opens[start]
            cut = behind == end and not closes[s]
            found.append((-1 if unknown else t - own, -1 if unknown or cut else behind - own))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_places_are_those_of_a_loop_and_unknown_where_a_window_cuts_a_concept(seed):
    rng = np.random.default_rng(seed)
    bounds = np.concatenate([[0], np.cumsum(rng.integers(1, 9, 6))])
    begins = rng.random(bounds[-1]) < 0.4
    begins[bounds[:-1]] = True
    opens = np.zeros(bounds[-1], bool)
    opens[bounds[:-1]] = rng.random(6) < 0.5
    closes = rng.random(6) < 0.5
    places = places_in_concepts(begins, bounds, opens, closes)
    assert list(zip(places.offset_T.tolist(), places.length_T.tolist())) == slow_places(begins, bounds, opens, closes)


def test_parts_of_a_concept_are_symmetric_its_ends_apart_and_its_middle_between():
    for length in range(1, 30):
        offset = np.arange(length)
        part = Places(offset, np.full(length, length)).relative_T
        if length < SHORTEST_RELATIVE:
            assert (part == -1).all()
            continue
        assert (part + part[::-1] == RELATIVE_BINS - 1).all()
        assert (np.diff(part) >= 0).all()
        assert (part == 0).sum() == (part == RELATIVE_BINS - 1).sum() == 1


@pytest.mark.parametrize("seed", range(20))
def test_no_stride_comes_nearer_to_a_number_of_concepts(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 300, 12)
    wanted = int(rng.integers(12, lengths.sum() + 1))

    def miss(stride):
        return abs(sum(math.ceil(n / stride) for n in lengths.tolist()) - wanted)

    # Counts change only where a stride divides a length.
    critical = sorted({n / k for n in lengths.tolist() for k in range(1, n + 1)})
    best = min(miss(s * (1 + e)) for s in critical for e in (-1e-9, 1e-9) if s * (1 + e) >= 1)
    assert miss(stride_for(lengths, wanted)) <= best
