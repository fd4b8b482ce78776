"""Whether a file system keeps the content of a new file before its name, so that nobody has to wait for a flush.

A power failure must not leave a name without its content. fsync(2) before rename(2) sees to that everywhere, but also
waits for the disk's cache and the journal to be on disk, ten times as long as for the writes themselves. ext4 and XFS
log what they do in order: once the writes have been done (sync_file_range(2) with SYNC_FILE_RANGE_WAIT_AFTER), the
blocks of the file and its size are in a transaction that is not later than that of the rename, as both end the
writeback of a page after they have logged them (ext4_release_io_end(), xfs_end_ioend()), and a commit flushes the
disk's cache first. Not so without a journal, with data=writeback, or with ext4's journal on another device.
"""

from __future__ import annotations

import os

_PROC = "/proc/fs"


def keeps_order(fs_type: str, dev: int) -> bool:
    """Whether that is so of the file system on device `dev` (st_dev); False where it cannot be known."""
    if fs_type == "xfs":
        return True
    if fs_type != "ext4":
        return False
    try:
        device = os.path.basename(os.readlink(f"/sys/dev/block/{os.major(dev)}:{os.minor(dev)}"))
        with open(f"{_PROC}/ext4/{device}/options") as file:
            options = file.read().split()
        # The journal's directory is called by its device, and its inode where that is of the file system itself.
        internal = any(entry.startswith(device + "-") for entry in os.listdir(f"{_PROC}/jbd2"))
    except OSError:
        return False
    return internal and ("data=ordered" in options or "data=journal" in options) and "barrier" in options
