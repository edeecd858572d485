"""Two tensor-parallel workers on one GPU, each of which believes to be on a machine of its own.

NCCL refuses two ranks on one GPU of one host, and takes NCCL_HOSTID's word for what is a host. Sums then go over a
socket: right, and slow. What this does not show is the links between two GPUs.
"""

from __future__ import annotations

import os

from steerback.engines.vllm.worker import SteeredWorker


class OneGpuWorker(SteeredWorker):
    def init_device(self) -> None:
        os.environ |= {"NCCL_HOSTID": f"steerback-{self.rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
        self.local_rank = 0
        super().init_device()
