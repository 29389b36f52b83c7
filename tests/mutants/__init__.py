"""The mistakes of a catalogue, each put back into the code by an edit, and the tests that catch it.

python -m tests.mutants
"""
