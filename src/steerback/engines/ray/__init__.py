"""The Ray engine: a run's requests spread over actors on a cluster, each with an engine of its own.

`actor` is the worker's side, `workers` starts, checks and replaces workers, `engine` deals requests to them.
"""
