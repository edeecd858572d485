"""Storage of a run on disk: ledger, cache, run folder and lock, atomic file writes, and progress display."""
