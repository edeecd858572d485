"""Steering on stock vLLM: compiled, in CUDA graphs, with interventions of its own for every request in one batch.

The engine process (`engine`, `driver`) checks requests and sends latent numbers; the worker (`worker`, `slots`,
`tables`, and `runners` with the hook points of vLLM's model runners) turns them into rows of tables that the edited
decoder layers read. Importing this package loads neither vLLM nor torch.
"""
