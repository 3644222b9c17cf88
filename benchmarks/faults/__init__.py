"""Programs that break runs on purpose, and count what that costs."""
