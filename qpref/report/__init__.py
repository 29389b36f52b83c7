"""Render one HTML page on one or several runs, from the files of their folders: no torch, no network, no model."""
