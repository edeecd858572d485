"""Statistics over judged trials: rates, MSI, intervals clustered by latent, paired tests.

Pure numpy (scipy where a distribution is needed): knows nothing of ledgers, engines or files.
"""

from steerback.metrics.agreement import Agreement, agreement, alpha, cohens_kappa, krippendorff_alpha, rank_correlation
from steerback.metrics.intervals import clopper_pearson, no_event_bound, wilson
from steerback.metrics.levels import Peak, Trend, find_peak, trend
from steerback.metrics.outcomes import (
    EMPTY,
    INVALID,
    STATES,
    UNSCORED,
    VALID,
    Outcome,
    Outcomes,
    cluster_code,
    outcome_of,
)
from steerback.metrics.paired import COMPARED, Comparison, PairedTest, compare, correct, holm, swap_test
from steerback.metrics.rates import (
    METRICS,
    VARIANTS,
    Estimate,
    Metric,
    Summary,
    View,
    counts,
    estimates,
    summarize,
    view,
)

__all__ = [
    "COMPARED",
    "EMPTY",
    "INVALID",
    "METRICS",
    "STATES",
    "UNSCORED",
    "VALID",
    "VARIANTS",
    "Agreement",
    "Comparison",
    "Estimate",
    "Metric",
    "Outcome",
    "Outcomes",
    "PairedTest",
    "Peak",
    "Summary",
    "Trend",
    "View",
    "agreement",
    "alpha",
    "clopper_pearson",
    "cluster_code",
    "cohens_kappa",
    "compare",
    "correct",
    "counts",
    "estimates",
    "find_peak",
    "holm",
    "krippendorff_alpha",
    "no_event_bound",
    "outcome_of",
    "rank_correlation",
    "summarize",
    "swap_test",
    "trend",
    "view",
    "wilson",
]
