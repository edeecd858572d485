"""From ledger rows to results: one module for each experiment's analysis. Knows metrics and the store alone."""
