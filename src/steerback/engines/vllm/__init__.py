"""Steering on unmodified vLLM, compiled and in CUDA graphs; each request of a batch can have different interventions.

The engine process (`engine`, `driver`) checks requests and sends latent numbers. The worker (`worker`, `slots`,
`tables`, and `runners` with the hook points of vLLM's model runners) writes them into rows of tables, which the edited
decoder layers read. Importing this package loads neither vLLM nor torch.
"""
