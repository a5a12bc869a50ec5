"""The Triton implementation."""
