"""Experiments: runs, sweeps and studies of them, what they cost, and the pages people read."""
