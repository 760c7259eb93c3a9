"""The scripts behind the speeds, costs and scores of docs/results.md. Each writes a CSV file to benchmarks/results."""

from pathlib import Path

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
