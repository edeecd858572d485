"""Everything a run keeps on disk: ledger, cache, run folder with its lock, files written whole, progress."""
