"""Waiting for another process's file lock: in silence for a few seconds, then its reason is said, once."""

from __future__ import annotations

import logging

from filelock import AcquireReturnProxy, BaseFileLock, SoftFileLock, Timeout

logger = logging.getLogger(__name__)

SAID_AFTER_SECONDS = 5.0
POLL_SECONDS = 1.0  # from then on: hundreds of ranks that ask every 50 ms weigh on a file system that builds


def acquire(lock: BaseFileLock, holder: str) -> AcquireReturnProxy:
    """Waits for a lock, as long as it takes; ``with acquire(...)`` gives it back.

    Args:
        holder: what the process that holds it is doing, for the message.
    """
    try:
        return lock.acquire(timeout=SAID_AFTER_SECONDS)
    except Timeout:
        soft = isinstance(lock, SoftFileLock)  # filelock's way out, which it takes at the first try
        ends = " (a mere file, as locks are not to be had there: remove it if that process is gone)" if soft else ""
        logger.warning("waiting for another process, which %s; it holds the lock %s%s", holder, lock.lock_file, ends)
    return lock.acquire(poll_interval=POLL_SECONDS)
