"""The scripts behind the figures on serving. Each writes a CSV file to benchmarks/results."""
