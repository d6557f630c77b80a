"""Worker processes that do not outlive the one they work for."""

import os
from multiprocessing import parent_process
from threading import Thread


def end_with_parent() -> None:
    """In a worker: ends it when its parent does, even by a kill.

    A pool's worker would wait for its next job for ever, or finish one that nobody wants.
    """
    parent = parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()
