"""One HTML page of one or several runs, from the files of their folders alone: no torch, no network, no model."""
