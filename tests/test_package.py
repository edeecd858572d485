"""The imported package: its version, and no usage data from libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_version_is_that_of_the_project() -> None:
    import tomllib

    import steerback

    assert steerback.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]


def test_libraries_send_no_usage_data_unless_the_user_asks() -> None:
    code = "import steerback, os; from huggingface_hub import constants as c; "
    code += "print(c.HF_HUB_DISABLE_TELEMETRY, os.environ['VLLM_NO_USAGE_STATS'])"
    clean = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_DISABLE_TELEMETRY", "VLLM_NO_USAGE_STATS")}
    for more, shown in (({}, "True 1"), ({"HF_HUB_DISABLE_TELEMETRY": "0", "VLLM_NO_USAGE_STATS": "0"}, "False 0")):
        kept = {k: v for k, v in clean.items() if k not in ("DO_NOT_TRACK", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
        done = subprocess.run([sys.executable, "-c", code], env=kept | more, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == shown
