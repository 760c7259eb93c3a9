"""What the speeds, costs and scores of docs/results.md come from; each script writes a CSV into benchmarks/results."""

from pathlib import Path

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
