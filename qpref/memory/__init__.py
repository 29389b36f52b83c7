"""Memory of a run: prediction, fit to the device, and recovery when it runs out."""
