"""What marks a file as ours: the name of the manifest's record, and the comment that seals the end
of the archive.
"""

# Inside torch's own prefix: torch refuses an archive with two prefixes.
RECORD = "archive/manifest.json"
MAGIC = b"savepoint1 "
DIGITS = 64  # of a sha256 in hex: the last bytes of the file
SEAL_BYTES = len(MAGIC) + 16 + 1 + DIGITS
