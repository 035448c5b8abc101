"""A sweep: one recipe under every combination of settings, each with several seeds, one run per trial."""
