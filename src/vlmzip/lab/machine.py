"""The device, versions and commit of a measurement."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import torch
import transformers

from vlmzip.version import __version__


def hardware(device: str | torch.device = "cpu") -> str:
    """Return the name of the GPU, or the name of the CPU and the number of threads that torch uses."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpus.read_text()) if cpus.exists() else None
    threads = torch.get_num_threads()
    return f"{model.group(1) if model else platform.machine()}, {threads} thread{'s'[: threads != 1]}"


def commit() -> str:
    """Return the commit of the running sources, with `-dirty` if they were changed; without git, the version."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = ""
    return commit or f"vlmzip {__version__}"


def about(device: str | torch.device = "cpu") -> dict[str, str]:
    """Return the device, versions and commit, which are the last columns of every row of a results file."""
    return {
        "device": hardware(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }


def file_name(what: str, device: str | torch.device = "cpu", *settings: str) -> str:
    """Return the file name of a CSV, made of the subject `what`, the hardware, the versions and the settings."""
    words = [what, hardware(device), f"torch{torch.__version__}", f"transformers{transformers.__version__}", *settings]
    return re.sub(r"[^A-Za-z0-9.+]+", "-", " ".join(words)).strip("-") + ".csv"
