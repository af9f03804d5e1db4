"""Runs whose laws are known, for the guides and the gallery: `python docs/planted.py` writes runs.csv and isoflop.csv.

144 DLCM runs (4 sizes x 4 numbers of tokens x 3 ratios x 3 shares) under eq 22 and 40 dense runs under Chinchilla's law, with
0.3% of noise on the loss, the loss where the decay of the rate begins, which follows eq 23, and the accuracy of a task with four
choices and 2,000 items. The column names are a user's own.
"""

from itertools import product

import numpy as np
import pandas as pd

from sweeps.smooth_cost import cost_function

DLCM = {"E0": 1.8, "A_t": 250.0, "d1": 0.34, "A_c": 60.0, "g": 0.35, "d2": 0.30, "A_d": 2000.0, "a": 0.366}
DENSE = {"E": 1.8, "A": 475.0, "alpha": 0.335, "B": 2000.0, "beta": 0.366}
GAIN = {"k": 0.012, "a": 1.4, "b": 0.12, "c": 0.01}
NOISE, ITEMS, CHANCE = 0.003, 2_000, 0.25


def before_decay(loss: np.ndarray, R: np.ndarray, N: np.ndarray) -> np.ndarray:
    """The loss where the decay of the rate begins, whose relative drop to `loss` follows eq 23; by fixed-point steps."""
    g, stable = GAIN, loss
    for _ in range(60):
        stable = loss / (1 - g["k"] * stable ** g["a"] * R ** g["b"] * N ** g["c"])
    return stable * np.exp(np.random.default_rng(2).normal(0, 0.001, len(loss)))


def main() -> None:
    """Draw the runs and write them."""
    rng = np.random.default_rng(1)
    cells = product([2e7, 1e8, 4e8, 1.5e9], [2e9, 1e10, 4e10, 1.6e11], [2, 4, 8], [0.3, 0.55, 0.8])
    dense = product(np.geomspace(2e7, 3e9, 8), np.geomspace(2e9, 1.6e11, 5), [1], [0.0])
    N, D, R, P = (np.array(column, dtype=float) for column in zip(*cells, *dense))
    k, d = DLCM, DENSE
    token, concept = N * (1 - P), np.where(P > 0, N * P, 1.0)
    of_dlcm = (
        k["E0"] + k["A_t"] / token ** k["d1"] + k["A_c"] * R ** k["g"] / concept ** k["d2"] + k["A_d"] / D ** k["a"]
    )
    of_dense = d["E"] + d["A"] / N ** d["alpha"] + d["B"] / D ** d["beta"]
    loss = np.where(P > 0, of_dlcm, of_dense) * np.exp(rng.normal(0, NOISE, len(N)))
    accuracy = CHANCE + (0.95 - CHANCE) / (1 + np.exp(5.0 * (loss - 2.5)))
    table = pd.DataFrame(
        {
            "name": [f"run{i:03d}" for i in range(len(N))],
            "n_params": N.round(),
            "n_tokens": D.round(),
            "compression": R,
            "share": P,
            "gpu_flops": cost_function(vocab_size=32_768, seq_len=2048)(N, D, R, P),
            "val_loss": loss.round(5),
            "stable_loss": before_decay(loss, R, N).round(5),
            "acc_quiz": np.random.default_rng(0).binomial(ITEMS, accuracy) / ITEMS,
        }
    )
    for name, rows in (("runs.csv", table), ("isoflop.csv", isoflop())):
        rows.to_csv(name, index=False)
        print(f"{name}: {len(rows)} runs")


def isoflop() -> pd.DataFrame:
    """Dense runs of the same law as isoFLOP profiles: nine sizes at each of five budgets, tokens as the FLOPs leave them."""
    N, C = (v.ravel() for v in np.meshgrid(np.geomspace(5e7, 6e9, 9), np.geomspace(1e19, 1e21, 5)))
    D = C / cost_function(vocab_size=32_768, seq_len=2048)(N, 1.0, 1.0, 0.0)
    d = DENSE
    loss = d["E"] + d["A"] / N ** d["alpha"] + d["B"] / D ** d["beta"]
    loss = loss * np.exp(np.random.default_rng(2).normal(0, NOISE, len(N)))
    columns = {"n_params": N.round(), "n_tokens": D.round(), "gpu_flops": C, "val_loss": loss.round(5)}
    return pd.DataFrame({"name": [f"iso{i:02d}" for i in range(len(N))], "compression": 1, "share": 0.0, **columns})


if __name__ == "__main__":
    main()
