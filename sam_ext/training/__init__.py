"""Training SAM: losses, simulated prompts, data and the loops."""
