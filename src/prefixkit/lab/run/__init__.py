"""A run, from its recipe to its report: what it reads, what it leaves, and how it is used afterwards."""
