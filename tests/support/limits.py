"""How long a test waits before it takes a program for hung. Under load a start alone takes minutes."""

HANG_SECS = 600
"""Ends a hang, and nothing else: no test is about how long something takes."""
LONGER_SECS = 6 * HANG_SECS
"""How long a stand-in sleeps that something else has to end."""
