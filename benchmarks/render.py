"""Puts the recorded results into the documentation: `python benchmarks/render.py [--check]`.

A page holds `<!-- table: NAME -->` and `<!-- end -->`; what stands between them is made from `results/NAME.json` (a pattern may
name several), so that no figure is typed by hand. `--check` changes nothing and fails where a page is out of date.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, format_table
from dlcm.record import read_json

DOCS = Path(__file__).parents[1] / "docs"
_MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
Payload = Mapping[str, Any]


def render(page: str) -> str:
    """`page` with everything between its markers made anew."""
    return _MARKED.sub(lambda found: found[1] + block(found[2]) + found[3], page)


def block(pattern: str) -> str:
    """The lines between the markers: for each result a table, and where it was measured."""
    paths = sorted(RESULTS.glob(f"{pattern}.json"))
    return "".join(one(path) for path in paths) or "\nNot measured yet.\n\n"


def one(path: Path) -> str:
    """Table and origin of one result."""
    payload = read_json(path)
    table = next((made for start, made in TABLES.items() if path.stem.startswith(start)), rows_table)
    return f"\n{table(payload)}\n\n{origin(payload)}\n\n"


def origin(payload: Payload) -> str:
    """Device and versions, in one line."""
    found = payload["environment"]
    n_threads = found["threads"]
    threads = f", {n_threads} thread{'s' * (n_threads > 1)}" if found["device_type"] == "cpu" else ""
    versions = {"torch": "torch", "triton": "Triton", "flash-attn": "flash-attn", "cuda": "CUDA"}
    if found["device_type"] == "cpu":
        versions = {"torch": "torch"}
    parts = [f"{title} {found['versions'][key]}" for key, title in versions.items() if found["versions"].get(key)]
    commit = (found.get("git_commit") or "")[:10]
    return (
        f"*{found['device']}{threads}; {', '.join(parts)}; {found['started_at'][:10]}, commit {commit or 'unknown'}.*"
    )


def rows_table(payload: Payload) -> str:
    """The rows as they were recorded."""
    return format_table([{name.replace("_", " "): value for name, value in row.items()} for row in payload["rows"]])


def gpu_throughput_table(payload: Payload) -> str:
    """A line for each model, compiled or not: what was measured of it, and its rate over that of Llama in the same mode."""
    lines = []
    for row in payload["rows"]:
        for model in ("llama", "dense", "dlcm"):
            rate, theirs = row.get(f"{model} tokens/s"), row.get("llama tokens/s")
            lines.append(
                {
                    "model": model,
                    "compiled": "yes" if row["compiled"] else "no",
                    "windows": row["windows"],
                    "tokens/s": rate,
                    "over llama": rate / theirs if rate and theirs else None,
                    "MFU": row.get(f"MFU {model}"),
                    "peak, GB": row.get(f"peak GB {model}"),
                    "estimated, GB": row.get(f"estimated GB {model}"),
                }
            )
    length, heads = payload["batch"][0]["seq_len"], payload["models"][0]["dense"]["d_head"]
    size = f"{payload['rows'][0]['size'] / 1e6:.0f}M parameters, heads of {heads}"
    return f"{format_table(lines)}\n\n{size}, windows of {length} tokens, bf16."


def coordinate_table(payload: Payload) -> str:
    """Largest scale of each group over the widths, relative to the base width: a column each parametrisation and axis."""
    titles = {
        "matrix": "ours",
        "module": "by module",
        "standard": "no muP",
        "token": "d",
        "concept": "D",
        "both": "both",
    }
    names = payload["checks"][0]["scales"]
    return format_table(
        [
            {"activations": name}
            | {
                f"{titles[check['grouping']]}, {titles[check['axis']]}": max(check["scales"][name])
                / check["scales"][name][0]
                for check in payload["checks"]
            }
            for name in names
        ]
    )


def ratio_table(payload: Payload) -> str:
    """Realised R of each target and way of control, over its seeds: mean, and the largest relative error of a seed."""
    groups: dict[tuple[float, str], list[Payload]] = {}
    for run in payload["runs"]:
        groups.setdefault((run["ratio"], run["mode"]), []).append(run)
    modes = {"loss": "ratio loss alone", "sample": "controller, sampling", "threshold": "controller, threshold"}
    columns = {
        "training": "train",
        "evaluation, threshold of training text": "uncalibrated",
        "evaluation": "calibrated",
    }
    return format_table(
        [
            {"target R": f"{ratio:g}", "control": modes.get(mode, mode), "seeds": len(runs)}
            | {
                title: _mean_and_worst([run[f"tokens_per_concept_{key}"] for run in runs], ratio)
                for title, key in columns.items()
            }
            for (ratio, mode), runs in groups.items()
        ]
    )


def _mean_and_worst(realised: Sequence[float | None], target: float) -> str | None:
    known = [x for x in realised if x is not None]
    if not known:
        return None
    worst = max((x / target - 1 for x in known), key=abs)
    return f"{sum(known) / len(known):.2f} ({worst:+.1%})"


def plan_table(payload: Payload) -> str:
    """Plans of ten thousand runs, then ways of counting."""
    plans = [
        {title.replace("cpu_s", "CPU, s").replace("peak_mb", "peak, MB"): x for title, x in row.items()}
        for row in payload["plan"]
    ]
    return f"{format_table(plans)}\n\n{format_table(payload['count'])}\n\n`dlcm --help`: {payload['help_s']:.2f} s"


def faults_table(payload: Payload) -> str:
    """How often each fault happened, and what came of it."""
    counts = format_table([{"fault": name, "times": n} for name, n in sorted(payload["faults"].items())])
    kinds = ("lost", "trained_twice", "wrong_runs", "wrong_rows")
    ends = ", ".join(f"{len(payload[kind])} {kind.replace('_', ' ')}" for kind in kinds)
    return (
        f"{counts}\n\n{payload['n_faults']} faults on {payload['n_runs']} runs in {payload['seconds']} s, "
        f"{payload['n_submissions']} submissions, seed {payload['seed']}: **{ends}**."
    )


def sweep_cost_table(payload: Payload) -> str:
    """What the sweep cost with and without shared trunks."""
    titles = {"flops": "training FLOPs", "run_seconds": "seconds of all runs", "elapsed_seconds": "seconds to the end"}
    rows = [
        {
            "": title,
            "alone": payload["alone"][key],
            "shared trunks": payload["shared"][key],
            "times less": payload["less"][key],
        }
        for key, title in titles.items()
    ]
    about = f"{payload['shared']['runs']} runs, of which {payload['shared']['branches']} branch from longer ones."
    return f"{format_table(rows)}\n\n{about}"


def data_table(payload: Payload) -> str:
    """Rates of tokenizing, then the loader beside the step."""
    return f"{format_table(payload['tokenizing'])}\n\n{format_table(payload['loader'])}"


def step_table(payload: Payload) -> str:
    """Both models, then what the comparison gives."""
    lines = [
        f"{ratio['mode']}: time ratio {ratio['time_ratio']:.3f}, FLOP ratio {ratio['flop_ratio']:.3f}, "
        f"**overhead {ratio['overhead']:.2f}** (limit {payload['limit']:g})"
        for ratio in payload["overheads"]
    ]
    batch = payload["batch"]
    peak = f"{payload['peak_flops_measured'] / 1e12:.3g} TFLOP/s"
    about = f"{batch['windows']} windows of {batch['seq_len']} tokens, {payload['precision']}; measured peak {peak}."
    return "\n".join([rows_table(payload), "", *(f"- {line}" for line in lines), "", about])


def cross_table(payload: Payload) -> str:
    """Every backend at R = 4, then how much faster the staircase is than replication at each R."""
    times = {
        (r["form"], r["direction"], r["width"], r["length"], r["R"], r["backend"]): r["ms"] for r in payload["rows"]
    }
    places = list(dict.fromkeys(key[1:4] for key in times if key[1] != "mask"))
    ratios = sorted({key[4] for key in times})
    # Where a token sees its own segment too, as the paper's replication has it.
    names = list(dict.fromkeys(key[5] for key in times if key[0] == "earlier" and key[1] != "mask"))
    backends = [
        {"width": width, "tokens": length, "direction": direction}
        | {f"{name}, ms": times.get(("earlier", direction, width, length, 4, name)) for name in names}
        for direction, width, length in places
    ]

    def faster(form: str, place: tuple[str, int, int], ratio: int) -> float | None:
        slow, fast = (times.get((form, *place, ratio, name)) for name in ("replicated", "staircase"))
        return slow / fast if slow and fast else None

    gains = [
        {"width": place[1], "tokens": place[2], "direction": place[0]}
        | {f"R = {ratio}": faster("earlier", place, ratio) for ratio in ratios}
        | {f"R = {ratio}, own": faster("own", place, ratio) for ratio in ratios}
        for place in places
    ]
    about = f"{payload['dtype']}, {payload['heads']} heads, one document, median of {payload['repeats']}."
    parts = [f"At R = 4; {about}", format_table(backends), GAINS, format_table(gains)]
    if payload.get("flex_over_replicated"):
        parts += [AGAINST_PAPER, format_table(payload["flex_over_replicated"])]
    return "\n\n".join(parts)


def design_table(payload: Payload) -> str:
    """One row a case: how many planted laws, how often the proposal knows more, and by how much."""
    return format_table(
        [
            {
                "template": case["recipe"],
                "budget, FLOPs": f"{case['budget_flops']:.0e}",
                "target": f"{case['target_flops']:.0e}",
                "laws": case["n_laws"],
                "P narrower": case["narrower_P"],
                "P interval, median": case["median_P_interval_ratio"],
                "P scatter, median": case["median_P_scatter_ratio"],
                "N narrower": case["narrower_N"],
                "N interval, median": case["median_N_interval_ratio"],
            }
            for case in payload["cases"]
        ]
    )


GAINS = (
    "How many times faster `staircase` is than `replicated`, under our visibility and, *own*, where a token sees its own\n"
    "segment too, which is the form that the paper's replication computes:"
)
AGAINST_PAPER = "FlexAttention's time over that of replication, at R = 4, here and in the paper's table 6:"


_OPEN = 0.965
"""Promised coverage from which intervals are open to a side often enough to say so."""


def coverage_table(payload: Payload) -> str:
    """A row a design and noise, a column a quantity: share covered, what was promised, share given where not all are."""
    rows: dict[tuple[str, float, int, int, str], dict[str, str]] = {}
    names = list(dict.fromkeys(row["of"] for row in payload["rows"]))
    for row in payload["rows"]:
        promised, given = row["promised"], row["given"]
        cell = f"{row['covered']:.3f}" + (f" of {promised:.2f}" if promised >= _OPEN else "")
        cell += f" ({given:.2f})" if given < 0.995 else ""
        key = (row["design"], row["noise"], row["sweeps"], row["first seed"], row["commit"][:7])
        rows.setdefault(key, {})[row["of"]] = cell
    return format_table(
        [
            {
                "design": design,
                "noise": f"{100 * noise:g}%",
                "sweeps": sweeps,
                **{name: cells.get(name, "") for name in names},
                "seeds from": f"{seed:,}",
                "commit": commit,
            }
            for (design, noise, sweeps, seed, commit), cells in rows.items()
        ]
    )


# By the start of a result's name; rows as they are for all others.
TABLES: dict[str, Callable[[Payload], str]] = {
    "train_throughput_cuda": gpu_throughput_table,
    "throughput_h200": gpu_throughput_table,
    "sweep_cost": sweep_cost_table,
    "data_": data_table,
    "coordinate_check": coordinate_table,
    "faults": faults_table,
    "plan_": plan_table,
    "ratio_control": ratio_table,
    "step_": step_table,
    "cross_attention_": cross_table,
    "design": design_table,
    "coverage": coverage_table,
}


def main() -> None:
    """Write the pages, or say which are out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail where a page is out of date")
    args = parser.parse_args()
    stale = [page for page in sorted(DOCS.glob("*.md")) if render(page.read_text()) != page.read_text()]
    for page in stale:
        if not args.check:
            page.write_text(render(page.read_text()))
        print(f"{page.name}: {'out of date' if args.check else 'written'}")
    if stale and args.check:
        sys.exit("run python benchmarks/render.py")


if __name__ == "__main__":
    main()
