"""`qpref init-plugin`: the tree of a new plugin's distribution, with tests that pass."""
