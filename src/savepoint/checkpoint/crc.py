"""The CRC32 that every byte of a checkpoint goes through, as it is written and as it is verified.

zlib's takes ten times as long.
"""

from isal.isal_zlib import crc32

__all__ = ["crc32"]
