"""Who is next: a bounded first-in, first-out line of generations that tells each where it stands.

Knows order and bound. Does not know the ranks.
"""

import asyncio
from collections import deque
from collections.abc import Iterator

from wan_grpc.engine.generation import GenerationLog


class AdmissionQueue:
    """Generations that were accepted and have not begun. Belongs to one asyncio loop."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._waiting: deque[GenerationLog] = deque()
        self._filled = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[GenerationLog]:
        """From the next one to the last."""
        return iter(tuple(self._waiting))

    def push(self, job: GenerationLog) -> None:
        self._waiting.append(job)
        self._filled.set()

    def remove(self, job: GenerationLog) -> None:
        self._waiting.remove(job)

    async def filled(self) -> None:
        """Return when somebody waits."""
        while not self._waiting:
            self._filled.clear()
            await self._filled.wait()

    def pop(self) -> GenerationLog:
        """The first in line, taken out of it."""
        return self._waiting.popleft()
