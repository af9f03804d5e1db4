"""Every table of figures in docs/flops.md is what the code computes."""

from pathlib import Path

import pytest

from flops import count, parameters
from tests.flops.test_count import PAPER_DENSE, PAPER_DLCM

PAGE = (Path(__file__).parents[2] / "docs" / "flops.md").read_text()


def table(first_cell: str) -> list[list[str]]:
    """The cells of the table whose head begins so, without head and rule."""
    lines = PAGE.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_cell} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def ratio(seq_len: int, tokens_per_concept: float = 4.0) -> float:
    dlcm = count(PAPER_DLCM, seq_len, tokens_per_concept)
    return dlcm.forward_per_token / count(PAPER_DENSE, seq_len).forward_per_token


def test_packing():
    whole = count(PAPER_DLCM, 2048, 4.0).forward
    rows = table("documents in a window of 2,048 tokens")
    assert len(rows) == 4
    for n, told in rows:
        packed = count(PAPER_DLCM, documents=[2048 // int(n)] * int(n), tokens_per_concept=4.0).forward
        assert told == f"{packed / whole:.3f}"


def test_six_n_d_beside_the_closed_form():
    rows = table("sequence length")
    assert len(rows) == 5
    for cells in rows:
        seq_len = int(cells[0].replace(",", ""))
        expected = [f"{ratio(seq_len):.3f}", f"{100 * count(PAPER_DLCM, seq_len, 4.0).share('backbone'):.1f}%"]
        for which in ("non_embedding", "total"):
            for model in (PAPER_DLCM, PAPER_DENSE):
                ours = count(model, seq_len).training_per_token
                expected.append(f"{6 * getattr(parameters(model), which) / ours:.2f}")
        assert cells[1:] == expected
    dlcm, dense = (
        6 * parameters(m).non_embedding / count(m, 2048).training_per_token for m in (PAPER_DLCM, PAPER_DENSE)
    )
    assert (
        f"The same rule is {100 * (dlcm - 1):.0f} % too high for one model and {100 * (1 - dense):.0f} % too low"
        in PAGE
    )
    assert f"differ by a factor of {dlcm / dense:.1f}" in " ".join(PAGE.split())


def test_ratio_of_compression():
    head = next(line for line in PAGE.splitlines() if line.startswith("| R |"))
    ratios = [float(cell) for cell in head.strip("|").split("|")[1:]]
    (row,) = table(head.strip("|").split(" | 1 |")[0].strip() + " | 1")
    assert row[1:] == [f"{ratio(2048, r):.3f}" for r in ratios]


@pytest.mark.parametrize(
    ("figure", "holds", "bounds"),
    [
        ("FLOPs over dense", lambda n: 0.92 <= ratio(n) <= 0.94, (1410, 2850)),
        ("share", lambda n: 0.33 <= count(PAPER_DLCM, n, 4.0).share("backbone") <= 0.34, (460, 1930)),
    ],
)
def test_lengths_at_which_the_papers_figures_hold(figure, holds, bounds):
    found = [n for n in range(64, 4096, 2) if holds(n)]
    assert (round(found[0], -1), round(found[-1], -1)) == bounds
    assert all(f"{bound:,}" in PAGE for bound in bounds)


def test_the_parameters_are_printed():
    for model in (PAPER_DLCM, PAPER_DENSE):
        assert f"{parameters(model).total:,}" in PAGE
    params = parameters(PAPER_DLCM)
    assert f"P = {params.concept_share:.3f}, or {params.concept_share_of_total:.3f} of all parameters" in PAGE
