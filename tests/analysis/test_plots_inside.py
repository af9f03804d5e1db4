"""Figures of what was measured inside the concepts: planted losses are drawn where they belong, with t intervals."""

import numpy as np
import pytest
from scipy import stats

from analysis.plots import new_figure, save_figure
from analysis.plots_inside import load_inside, plot_loss_by_position, plot_tokens_per_concept
from dlcm.concept_statistics import Places, loss_by_place, tokens_per_concept_by
from dlcm.errors import UserError
from dlcm.record import write_json

N_DOCUMENTS, LENGTH, U = 30, 6, np.array([0.3, 0.1, 0.1, 0.1, 0.1, 0.4])


def planted(target: float = 4.0, seed: int = 0) -> dict:
    """A record of concepts of six tokens whose loss over dense is a U, a little different in each document."""
    rng = np.random.default_rng(seed)
    document = np.repeat(np.arange(N_DOCUMENTS), 10 * LENGTH)
    offset = np.tile(np.arange(LENGTH), N_DOCUMENTS * 10)
    difference = U[offset] + rng.normal(0, 0.05, N_DOCUMENTS)[document]
    dense = 3.0 + rng.normal(0, 0.3, N_DOCUMENTS)[document]
    places = Places(offset, np.full(len(offset), LENGTH))
    losses = {"model": dense + difference, "dense": dense, "difference": difference}
    groups = {"relative": (places.relative_T, 5), "offset": (offset, 8), "from_end": (LENGTH - 1 - offset, 8)}
    begins = offset == 0
    label = (document % 2).astype(int)
    rows = tokens_per_concept_by(label, begins, document, 2).rows()
    return {
        "schema": 1,
        "run_id": f"run-{target:g}-{seed}",
        "compression_target": target,
        "tokens_per_concept": tokens_per_concept_by(np.zeros_like(label), begins, document, 1).rows()[0],
        "places": {
            name: {key: loss_by_place(x, group, document, n).rows() for key, x in losses.items()}
            for name, (group, n) in groups.items()
        },
        "content": {name: {"tokens_per_concept": row} for name, row in zip(("code", "prose"), rows)},
        "sources": None,
    }


def drawn(container) -> tuple[np.ndarray, np.ndarray]:
    """Values and half widths of a series with error bars."""
    line, _, (bars,) = container
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    return np.asarray(line.get_ydata()), (ends[:, 1] - ends[:, 0]) / 2


def test_the_u_is_drawn_with_its_intervals_over_documents():
    record = planted()
    _, ax = new_figure()
    plot_loss_by_position(ax, [record])
    value, half = drawn(ax.containers[0])
    truth = np.array([0.3, 0.1, 0.1, 0.1, 0.4])
    # The four inner tokens of six fall into three parts; all parts have the same loss over dense.
    assert (np.abs(value - truth) <= half).all()
    errors = [row["stderr"] for row in record["places"]["relative"]["difference"]]
    np.testing.assert_allclose(half, stats.t.ppf(0.975, N_DOCUMENTS - 1) * np.array(errors))
    assert value[0] > value[2] < value[-1]


@pytest.mark.parametrize("place", ["offset", "from_end"])
def test_each_token_from_the_start_or_the_end_has_its_place_and_what_is_far_away_none(place):
    _, ax = new_figure()
    plot_loss_by_position(ax, [planted(), planted(seed=1)], place=place, measure="model")
    assert len(ax.containers) == 2
    value, _ = drawn(ax.containers[0])
    shape = U if place == "offset" else U[::-1]
    # Documents differ by their mean alone, so the shape is there exactly.
    np.testing.assert_allclose(value - value[0], shape - shape[0], atol=1e-9)
    assert all("run-4" in text.get_text() for text in ax.get_legend().get_texts())


def test_tokens_per_concept_are_drawn_by_content_with_their_targets():
    _, ax = new_figure()
    plot_tokens_per_concept(ax, [planted(), planted(8.0)])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["all", "code", "prose"]
    for container in ax.containers:
        assert drawn(container)[0].tolist() == [6.0, 6.0, 6.0]
    levels = {
        line.get_ydata()[0] for line in ax.lines if len(set(line.get_ydata())) == 1 and line.get_linestyle() == ":"
    }
    assert levels == {4.0, 8.0}


def test_records_are_read_from_a_run_or_a_sweep_in_the_order_of_their_targets(tmp_path):
    for target in (8.0, 2.0):
        write_json(tmp_path / "sweep" / f"r{target:g}" / "inside.json", planted(target))
    assert [r["compression_target"] for r in load_inside(tmp_path / "sweep")] == [2.0, 8.0]
    assert len(load_inside(tmp_path / "sweep" / "r8")) == 1
    figure, ax = new_figure()
    plot_tokens_per_concept(ax, load_inside(tmp_path / "sweep"))
    assert save_figure(figure, tmp_path / "figure.svg").stat().st_size > 5000


@pytest.mark.slow
def test_what_cannot_be_drawn_is_refused_with_the_way_out(tmp_path):
    _, ax = new_figure()
    with pytest.raises(UserError, match="no run has inside.json.*--validation"):
        load_inside(tmp_path)
    write_json(tmp_path / "inside.json", planted() | {"schema": 7})
    with pytest.raises(UserError, match="schema 7"):
        load_inside(tmp_path)
    alone = planted()
    for groups in alone["places"].values():
        del groups["difference"], groups["dense"]
    with pytest.raises(UserError, match="no dense model to compare with.*--against"):
        plot_loss_by_position(ax, [alone])
    with pytest.raises(UserError, match="place: 'middle'; expected one of relative"):
        plot_loss_by_position(ax, [planted()], place="middle")
