"""The paper's published numbers, its authors' result files, and the comparison with a run."""
