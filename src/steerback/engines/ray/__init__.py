"""The Ray engine: distributes a run's requests over actors on a cluster, each with a separate engine.

`actor` is the worker's side, `workers` starts, checks and replaces workers, `engine` sends requests to them.
"""
