"""Being asked to stop: by a signal, or by what a supervisor or a scheduler writes into the run directory (survive/lease.py)."""

import os
import signal
import threading
import time
from types import FrameType

from megacpt import log
from megacpt.survive.lease import REPEAT_SECONDS


class StopRequest:
    """SIGTERM, SIGUSR1 or SIGINT ask for a checkpoint at the next step boundary; a second one leaves at once. SIGTERM and SIGUSR1 may come
    twice for one reason, from the scheduler to every process and from torchrun, so they must be ten seconds apart for that.

    A thread hears them: Python's own handlers run in the main thread only between two of its instructions, and a collective is one.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.signal: str | None = None
        """What this rank heard: a signal's name, or what a stop request in the run directory says."""
        self._heard = 0.0
        self.agreed = False
        """Whether any rank heard something, as all know."""
        self._before = {number: signal.signal(number, _ignore) for number in self.SIGNALS}
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._old = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def _listen(self) -> None:
        while received := os.read(self._reader, 1):
            if received[0] not in self.SIGNALS:
                continue
            now = time.monotonic()
            if self._heard and (received[0] == signal.SIGINT or now - self._heard > REPEAT_SECONDS):
                os._exit(75)
            self._heard = self._heard or now
            self.ask(signal.Signals(received[0]).name)
        os.close(self._reader)

    def ask(self, why: str) -> None:
        """As a signal does; what asks by a file and by a signal, as a supervisor and torchrun may, asks once."""
        if not self.signal:
            self.signal = why
            log.info(f"{why}: saving after this step or the next; SIGINT to leave at once.")

    def close(self) -> None:
        """Signals do again what they did before."""
        signal.set_wakeup_fd(self._old)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writer)


def _ignore(number: int, frame: FrameType | None) -> None:
    """The thread hears it."""
