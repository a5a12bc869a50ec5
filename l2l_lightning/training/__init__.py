"""Meta-training: the Lightning module, its data, its trainer, and the files that it leaves."""
