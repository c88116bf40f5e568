import asyncio
import random

from wan_grpc.engine.bell import Bell, rang


async def test_a_ring_between_ticket_and_wait_is_heard() -> None:
    """Who took a ticket before the ring does not wait, however late it comes to waiting."""
    bell = Bell()
    ticket = bell.ticket()
    bell.ring()
    bell.ring()
    assert await rang(ticket, 5.0)


async def test_a_ring_before_the_ticket_is_not_heard() -> None:
    """A new ticket waits for the next ring, and gives up when its time is over."""
    bell = Bell()
    bell.ring()
    assert not await rang(bell.ticket(), 0.01)


async def test_everybody_who_waits_hears_one_ring() -> None:
    """One ring wakes all."""
    bell = Bell()
    waiting = [asyncio.create_task(rang(bell.ticket(), None)) for _ in range(50)]
    await asyncio.sleep(0)
    bell.ring()
    assert await asyncio.gather(*waiting) == [True] * 50


async def test_a_ring_calls_who_wants_to_be_called() -> None:
    """At every ring, after the tickets of before are due."""
    bell = Bell()
    ticket, seen = bell.ticket(), []
    bell.call(lambda: seen.append(ticket.is_set()))
    bell.call(lambda: seen.append(2))
    bell.ring()
    bell.ring()
    assert seen == [True, 2, True, 2]


async def test_a_wait_that_is_cancelled_is_no_timeout() -> None:
    """Cancelling the waiter ends it as cancelled."""
    task = asyncio.create_task(rang(Bell().ticket(), 10.0))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_no_change_is_missed() -> None:
    """Listeners that look and then wait see the last of a thousand changes, however they are mixed with the changes."""
    bell, state, chance = Bell(), [0], random.Random(1)

    async def change() -> None:
        for number in range(1, 1001):
            state[0] = number
            bell.ring()
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)

    async def listen() -> None:
        while True:
            ticket = bell.ticket()
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)
            if state[0] == 1000:
                return
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)
            await rang(ticket, None)

    async with asyncio.timeout(30):
        await asyncio.gather(change(), *(listen() for _ in range(10)))
