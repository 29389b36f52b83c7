"""Measurements quoted in the documentation. `python -m benchmarks.<name> --help` shows the options of each."""
