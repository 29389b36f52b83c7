"""Render HTML pages: the report of runs from the files of their folders, and the findings of `qpref check`; no torch."""
