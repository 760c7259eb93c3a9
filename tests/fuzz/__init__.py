"""Broken input for every command: `make fuzz` counts tracebacks, hangs and wrong exit codes; there should be none."""
