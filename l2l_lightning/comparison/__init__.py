"""Hand-designed optimizers, tuned, and the paired comparison of a trained rule with them."""
