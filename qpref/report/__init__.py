"""Render HTML pages: the report of runs from their folders, and the findings of `qpref check`; no torch, no model."""
