"""One way to say "something changed" to any number of coroutines, without a queue that a slow one could fill."""

import asyncio
from collections.abc import Callable


class Bell:
    """Take a ticket, look at the state, then wait for the ticket: no change in between is missed."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._calls: list[Callable[[], None]] = []

    def ring(self) -> None:
        self._event.set()
        self._event = asyncio.Event()
        for call in self._calls:
            call()

    def call(self, hook: Callable[[], None]) -> None:
        """Have `hook` called by every ring from now on. It must not raise."""
        self._calls.append(hook)

    def ticket(self) -> asyncio.Event:
        """An event that the next ring sets."""
        return self._event


async def rang(ticket: asyncio.Event, timeout_s: float | None) -> bool:
    """Wait for a ticket; False when `timeout_s` passed first."""
    try:
        async with asyncio.timeout(timeout_s):
            await ticket.wait()
    except TimeoutError:
        return False
    return True
