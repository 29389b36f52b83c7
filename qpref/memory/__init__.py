"""Memory of a run: predicted, fitted to the device, and what happens when it runs out."""
