"""One job at a time in a run's folder."""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from pathlib import Path

log = logging.getLogger("fastdiff")


class RunLock:
    """A lock on a run's folder, held until `release` or the process's end, however that comes.

    A POSIX record lock: the system drops it when its process dies, kill -9 included, and children
    (loader workers) do not inherit it, so nothing is left to clean up. NFS passes it to the server;
    on a file system without such locks a warning says that nothing is held.

    Args:
        folder: The run's; made if it is not there.

    Raises:
        RuntimeError: Another process holds it; the message has its pid and host.
    """

    def __init__(self, folder: Path) -> None:
        import fcntl

        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._file, 1000, 0).decode(errors="replace").strip()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                log.warning(
                    "%s: no lock on this file system (%s); start one job only",
                    *(folder, error.strerror),
                )
                return
            os.close(self._file)
            raise RuntimeError(
                f"{folder} is in use by {holder or 'another process'}; wait for it, stop it, or "
                "give another train.out"
            ) from error
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        text = f"process {os.getpid()} on {socket.gethostname()} since {started}\n"
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, text.encode(), 0)

    def release(self) -> None:
        """Let another process have it."""
        os.close(self._file)
