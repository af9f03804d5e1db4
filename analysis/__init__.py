"""What the runs say: laws, fits with intervals and status, the compute optimum, plots and tables. No torch, no scheduler."""

from typing import TYPE_CHECKING

from dlcm.lazy import lazy_exports

if TYPE_CHECKING:
    from analysis import laws as laws
    from analysis.accuracy import flops_vs_accuracy as flops_vs_accuracy
    from analysis.compare import compare_at_matched_compute as compare_at_matched_compute
    from analysis.compare import ratio_table as ratio_table
    from analysis.cost import cost_of_results as cost_of_results
    from analysis.data import ResultsData as ResultsData
    from analysis.data import load_results as load_results
    from analysis.downstream import DownstreamFit as DownstreamFit
    from analysis.downstream import fit_downstream as fit_downstream
    from analysis.fit import fit as fit
    from analysis.frontier import frontier as frontier
    from analysis.laws import Law as Law
    from analysis.optimum import Optimum as Optimum
    from analysis.optimum import optimum as optimum
    from analysis.plots import new_figure as new_figure
    from analysis.plots import plot_loss_vs_compute as plot_loss_vs_compute
    from analysis.plots import plot_predicted_vs_measured as plot_predicted_vs_measured
    from analysis.plots import plot_realised_ratio as plot_realised_ratio
    from analysis.plots import save_figure as save_figure
    from analysis.plots_inside import load_inside as load_inside
    from analysis.plots_inside import plot_loss_by_position as plot_loss_by_position
    from analysis.plots_inside import plot_tokens_per_concept as plot_tokens_per_concept
    from analysis.plots_shares import plot_loss_vs_share as plot_loss_vs_share
    from analysis.regret import regret as regret
    from analysis.report import Analysis as Analysis
    from analysis.report import analyze as analyze
    from analysis.result import FitResult as FitResult
    from analysis.savings import savings as savings
    from analysis.tables import format_table as format_table
    from analysis.task_data import task_data as task_data

_PLOTS = (
    "new_figure",
    "plot_loss_vs_compute",
    "plot_predicted_vs_measured",
    "plot_realised_ratio",
    "save_figure",
)
lazy_exports(
    __name__,
    {
        "laws": "analysis.laws",
        "Law": "analysis.laws",
        "ResultsData": "analysis.data",
        "load_results": "analysis.data",
        "fit": "analysis.fit",
        "fit_downstream": "analysis.downstream",
        "DownstreamFit": "analysis.downstream",
        "task_data": "analysis.task_data",
        "FitResult": "analysis.result",
        "optimum": "analysis.optimum",
        "Optimum": "analysis.optimum",
        "savings": "analysis.savings",
        "frontier": "analysis.frontier",
        "regret": "analysis.regret",
        "cost_of_results": "analysis.cost",
        "compare_at_matched_compute": "analysis.compare",
        "ratio_table": "analysis.compare",
        **dict.fromkeys(_PLOTS, "analysis.plots"),
        "plot_loss_vs_share": "analysis.plots_shares",
        "flops_vs_accuracy": "analysis.accuracy",
        **dict.fromkeys(("load_inside", "plot_loss_by_position", "plot_tokens_per_concept"), "analysis.plots_inside"),
        "format_table": "analysis.tables",
        "Analysis": "analysis.report",
        "analyze": "analysis.report",
    },
)
