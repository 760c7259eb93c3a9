"""`python -m vlmzip COMMAND …`: the same as `vlmzip COMMAND …`."""

import os
import sys

if __name__ == "__main__":
    if not sys.flags.safe_path and sys.path[0] == os.getcwd():
        del sys.path[0]  # `python -m` adds it, and files in it would shadow libraries
    from vlmzip.cli.main import main  # only now, for the same reason

    sys.exit(main())
