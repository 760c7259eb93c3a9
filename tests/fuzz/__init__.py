"""Fuzzing: `make fuzz` gives broken input to every command and counts tracebacks, hangs and wrong exit codes."""
