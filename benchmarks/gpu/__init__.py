"""Proof of the CUDA path on a real GPU: correctness, memory, time, and the race against TRL.

Nothing here has run on a GPU yet. `python -m benchmarks.gpu --rehearse` runs the same code on a CPU, at tiny sizes.
"""
