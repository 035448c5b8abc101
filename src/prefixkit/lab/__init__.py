"""Experiments: one run from recipe to report."""
