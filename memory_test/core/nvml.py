"""What the driver says the device holds: NVML, through nvidia-ml-py."""

import os
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class DeviceUse:
    """Bytes on the device: of this process (`None` where only the whole device can be seen) and of all."""

    process_bytes: int | None
    used_bytes: int | None
    note: str


def device_use() -> DeviceUse:
    """Ask NVML about the current CUDA device; never raises."""
    try:
        import pynvml
    except ImportError:
        return DeviceUse(None, None, "NVML not available (nvidia-ml-py is not installed)")
    try:
        pynvml.nvmlInit()
        properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        used = int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
        mine = [
            p.usedGpuMemory for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == os.getpid()
        ]
    except pynvml.NVMLError as error:
        return DeviceUse(None, None, f"NVML not available ({error})")
    if mine and mine[0] is not None:
        return DeviceUse(int(mine[0]), used, "NVML, this process")
    return DeviceUse(None, used, "NVML, the whole device: the process is not visible from inside this container")
