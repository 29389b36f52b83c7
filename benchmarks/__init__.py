"""Measurements that the documents quote. `python -m benchmarks.<name> --help` says what each takes."""
