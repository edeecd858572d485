"""Statistics over judged trials: rates, MSI, intervals clustered by latent, paired tests.

The functions take numpy arrays. Distributions and intervals come from scipy and statsmodels where these
have them. This package knows nothing about ledgers, engines or files.
"""

from steerback.metrics.agreement import agreement, alpha, rank_correlation
from steerback.metrics.between import TwoSampleTest, between, correct_pairs
from steerback.metrics.intervals import wilson
from steerback.metrics.levels import Peak, Trend, find_peak, trend
from steerback.metrics.outcomes import VALID, Outcomes, cluster_code, outcome_of
from steerback.metrics.paired import Comparison, compare, correct
from steerback.metrics.rates import METRICS, VARIANTS, Estimate, Summary, summarize, view

__all__ = [
    "METRICS",
    "VALID",
    "VARIANTS",
    "Comparison",
    "Estimate",
    "Outcomes",
    "Peak",
    "Summary",
    "Trend",
    "TwoSampleTest",
    "agreement",
    "alpha",
    "between",
    "cluster_code",
    "compare",
    "correct",
    "correct_pairs",
    "find_peak",
    "outcome_of",
    "rank_correlation",
    "summarize",
    "trend",
    "view",
    "wilson",
]
