"""A results table like the demo's, from planted laws, with the columns of the contract."""

import sys
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import laws

VOCABULARY, WIDTH, SEQ_LEN = 4096, 96, 256
PLANTED_DENSE = {"E": 1.9, "A": 8.0, "alpha": 0.2, "B": 180.0, "beta": 0.34}
PLANTED_DLCM = {
    "E0": 1.9, "A_t": 5.0, "t_t": 0.0, "d1": 0.2, "A_c": 1.6, "g": 0.25, "t_c": 0.0, "d2": 0.18,
    "A_d": 180.0, "t_d": 0.0, "a": 0.34,
}  # fmt: skip


def forward_flops(N, R, P):
    """FLOPs of one token: weights once a token or once a concept, the head, and attention that grows with the square root of N."""
    N, R, P = (np.asarray(v, dtype=float) for v in (N, R, P))
    return 2 * N * (1 - P) + 2 * N * P / R + 2 * WIDTH * VOCABULARY + SEQ_LEN * np.sqrt(N) * (1 - P + P / R**2)


def cost(N, D, R, P):
    """Training FLOPs of the synthetic sweep."""
    return 3 * np.asarray(D, dtype=float) * forward_flops(N, R, P)


def row(
    model: str, N: float, D: float, R: float, P: float, rng: np.random.Generator, noise: float, seed: int = 0
) -> dict:
    realised = R * (1 + rng.normal(0, 0.01)) if model == "dlcm" else 1.0
    if model == "dlcm":
        loss = laws.COMPRESSION_AWARE.predict(PLANTED_DLCM, N=N, D=D, R=realised, P=P)
    else:
        loss = laws.CHINCHILLA.predict(PLANTED_DENSE, N=N, D=D)
    loss = float(loss) * np.exp(rng.normal(0, noise))
    concept, embedding = round(N * P), 2 * VOCABULARY * WIDTH
    skill = 0.25 + 0.1 * (5.0 - loss)
    return {
        "run_id": f"{model}-n{N:.0f}-p{P:g}-r{R:g}-t{D:.0f}-s{seed}",
        "sweep": "synthetic",
        "model": model,
        "boundary": "learned" if model == "dlcm" else "none",
        "seed": seed,
        "params_total": round(N) + embedding,
        "params_embedding": embedding,
        "params_token": round(N) - concept,
        "params_concept": concept,
        "concept_share": concept / round(N),
        "compression_target": R,
        "tokens_per_concept": realised,
        "tokens_per_concept_train": R * (1 + rng.normal(0, 0.005)) if model == "dlcm" else 1.0,
        "tokens": round(D),
        "epochs": D / 8e6,
        "seq_len": SEQ_LEN,
        "budget": "",
        "flops_train": float(cost(N, D, realised, P)),
        "flops_train_planned": float(cost(N, D, R, P)),
        "flops_per_token_forward": float(forward_flops(N, realised, P)),
        "loss_nats": loss,
        "bits_per_byte": loss / np.log(2) / 3.2,
        "lr_token": 3e-3,
        "lr_concept": 3e-3,
        "status": "finished",
        "wall_s": 20.0,
        "device": "cpu",
        "acc_passage": round(skill, 4),
        "acc_passage_stderr": 0.02,
        "acc_norm_passage": round(skill, 4) + 0.01,
        "bpb_passage": loss / 2,
        "bpb_passage_stderr": 0.01,
        "acc_openbook_qa": round(skill - 0.05, 4),
        "acc_openbook_qa_stderr": 0.019,
    }


def make_frame(
    sizes: Iterable[float], budgets: Iterable[float], *, dense_sizes: Iterable[float], noise: float = 0.004,
    shares: Iterable[float] = (0.3, 0.5, 0.7), ratios: Iterable[float] = (2.0, 4.0), seeds: Iterable[int] = (0,),
) -> pd.DataFrame:  # fmt: skip
    """Every size, share, ratio and seed at every budget in FLOPs; tokens follow from the cost."""
    rng = np.random.default_rng(7)
    rows = []
    for budget in budgets:
        for seed in seeds:
            for N in sizes:
                for P in shares:
                    for R in ratios:
                        rows.append(row("dlcm", N, budget / float(cost(N, 1, R, P)), R, P, rng, noise, seed))
            for N in dense_sizes:
                rows.append(row("dense", N, budget / float(cost(N, 1, 1, 0)), 1.0, 0.0, rng, noise, seed))
    frame = pd.DataFrame(rows)
    frame["budget"] = [f"{v:.2g} FLOPs" for v in frame["flops_train_planned"]]
    return frame


@pytest.fixture(scope="session")
def demo_frame() -> pd.DataFrame:
    """The demo's design: 12 DLCM runs of one size, 6 dense runs of three sizes, two budgets."""
    return make_frame([9e5], [1e12, 3e12], dense_sizes=[3e5, 6e5, 1.2e6])


@pytest.fixture(scope="session")
def adequate_frame() -> pd.DataFrame:
    """Four sizes over 1.8 decades, three shares, three ratios, four budgets: enough for the law without offsets."""
    return make_frame(
        [1e5, 5e5, 2e6, 6e6],
        [3e11, 3e12, 3e13, 3e14],
        dense_sizes=[1e5, 3e5, 1e6, 2e6, 6e6],
        ratios=(2.0, 4.0, 8.0),
        noise=0.001,
    )


@pytest.fixture(scope="session")
def adequate_fits(adequate_frame, tmp_path_factory):
    """The fits of both families to `adequate_frame`, with a small bootstrap."""
    from analysis import fit, load_results

    path = tmp_path_factory.mktemp("adequate") / "results.parquet"
    adequate_frame.to_parquet(path)
    data = load_results(path)
    law = laws.COMPRESSION_AWARE.fix(t_t=0, t_c=0, t_d=0)
    return {"dense": fit(laws.CHINCHILLA, data, n_bootstrap=20), "dlcm": fit(law, data, n_bootstrap=20)}


@pytest.fixture
def write_results(tmp_path: Path) -> Callable[..., Path]:
    """Write a frame as results.parquet (or .csv) and return its path."""

    def write(frame: pd.DataFrame, name: str = "results.parquet") -> Path:
        path = tmp_path / name
        frame.to_parquet(path) if path.suffix == ".parquet" else frame.to_csv(path, index=False)
        return path

    return write


@pytest.fixture
def run(monkeypatch, capsys):
    """The command line with the verbs of `analysis` alone: (exit code, stdout, stderr)."""
    from dlcm import cli

    point = EntryPoint("analyze", "analysis.commands:app", "dlcm.commands")
    monkeypatch.setattr(cli, "entry_points", lambda group: [point])

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dlcm", "analyze", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return call
