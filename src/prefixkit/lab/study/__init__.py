"""A study: arms that differ in a few settings, each at a learning rate of its own, over seeds, held against claims."""
