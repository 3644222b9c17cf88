"""Checkpoints on disk. Nothing is imported here: `manifest` and the commands start without torch."""
