"""Probes: heads trained on frozen features, whole sweeps at a time."""
