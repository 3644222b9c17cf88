"""Checkpoints on disk. Nothing is imported here: commands that only list start without torch."""
