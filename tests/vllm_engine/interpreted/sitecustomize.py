"""Lets vLLM's second model runner work without a GPU: its Triton kernels run in Triton's interpreter.

On the path of every Python process of `make test-vllm` that says TRITON_INTERPRET=1. vLLM asks whether Triton has a
backend for the CPU, and there is none in the package; the interpreter needs none.
"""

import os
from types import SimpleNamespace

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)  # type: ignore[assignment]
