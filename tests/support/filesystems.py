"""File systems that fail, for tests that run as root.

They are mounted in a mount namespace of this process alone: when it ends, however it ends, the
kernel unmounts them and frees their loop devices.
"""

import ctypes
import errno
import fcntl
import functools
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

NEW_MOUNTS = 0x00020000  # CLONE_NEWNS of <sched.h>
# Of ext4 and XFS alike: what is not on the device at this moment is lost.
SHUTDOWN, LOSE_THE_LOG = 0x8004587D, 2


@dataclass
class Disk:
    """A file system in a file (ext4, xfs) or in memory (tmpfs)."""

    directory: Path
    kind: str
    image: Path | None
    options: str

    def mount(self) -> None:
        source = (
            ["-o", f"loop,{self.options}", str(self.image)]
            if self.image
            else ["-o", self.options, "tmpfs"]
        )
        command("mount", "-t", self.kind, *source, str(self.directory))

    def unmount(self) -> None:
        command("umount", str(self.directory))

    def cut(self) -> None:
        """The power fails: only unmounting works from here on. `mount` then shows what was on the
        device.
        """
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", LOSE_THE_LOG))
        finally:
            os.close(descriptor)

    def fail(self) -> None:
        """What ext4 does after an error on the device: from here on it is read-only."""
        source = command(
            "findmnt", "--noheadings", "--output", "SOURCE", str(self.directory)
        ).strip()
        Path("/sys/fs/ext4", Path(source).name, "trigger_fs_error").write_text("1")

    def repair(self) -> None:
        """Unmounted and mounted again, with what a boot does in between."""
        self.unmount()
        # 1 where it has mended something.
        subprocess.run(["e2fsck", "-p", str(self.image)], capture_output=True)
        self.mount()


@contextmanager
def disk(folder: Path, kind: str, megabytes: int, *make: str, options: str = "") -> Iterator[Disk]:
    """A new file system, mounted at a directory in `folder` that everybody may enter. `make`:
    arguments of its mkfs.
    """
    enter_private_namespace()
    directory = folder / f"{kind}-disk"
    directory.mkdir(parents=True)
    image = None if kind == "tmpfs" else folder / f"{kind}.img"
    if image:
        require_tools(kind)
        with image.open("xb") as file:
            file.truncate(megabytes << 20)
        command(f"mkfs.{kind}", "-q", *make, str(image))
    made = Disk(directory, kind, image, options or ("defaults" if image else f"size={megabytes}m"))
    made.mount()
    try:
        yield made
    finally:
        if (
            os.path.ismount(directory)
            and subprocess.run(["umount", directory], capture_output=True).returncode
        ):
            # A process that failed to end holds it, until it does.
            command("umount", "--lazy", str(directory))
        if image:
            image.unlink()


@functools.cache
def enter_private_namespace() -> None:
    """From here on, what this process mounts exists for it and its children only."""
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() != 0 or libc.unshare(NEW_MOUNTS) != 0:
        pytest.skip(
            f"mounting is not permitted here: {os.strerror(ctypes.get_errno() or errno.EPERM)}"
        )
    command("mount", "--make-rprivate", "/")


def require_tools(kind: str) -> None:
    if shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"no mkfs.{kind} here (package {'xfsprogs' if kind == 'xfs' else 'e2fsprogs'})")
    if (
        found := subprocess.run(["losetup", "--find"], capture_output=True, text=True)
    ).returncode != 0:
        pytest.skip(f"no loop device here: {found.stderr.strip()}")


def command(*arguments: str) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(arguments)}: {done.stderr}"
    return done.stdout


def fill(path: Path) -> None:
    """Takes all the room that is left."""
    with path.open("ab", buffering=0) as file:
        # Twice: what a file system holds back it gives once it is asked.
        for piece in 2 * (1 << 20, 1 << 12):
            try:
                while True:
                    file.write(bytes(piece))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                os.fsync(file.fileno())
