"""What marks a file as ours: the name of the manifest's record, and the comment that seals the end
of the archive.
"""

PREFIX = "archive/"  # torch's own: it refuses an archive with two prefixes
RECORD = f"{PREFIX}manifest.json"
MAGIC = b"savepoint1 "
DIGITS = 64  # of a sha256 in hex: the last bytes of the file
SEAL_BYTES = len(MAGIC) + 16 + 1 + DIGITS
