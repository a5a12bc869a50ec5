"""Presets: `--config NAME`."""
