"""Two hosts on one machine: what a test starts on the other one reaches this one through a network, as from afar."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoHosts:
    """This one and the other one."""

    kind: str
    """What keeps them apart."""
    address: str
    """At which the other one reaches this one."""
    own_addresses: frozenset[str]
    """Of this one in the network of the two."""
    other_addresses: frozenset[str]
    """Of the other one."""
    enter: Sequence[str]
    """What a command begins with to run on the other one."""


@contextlib.contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """The other host is a network namespace at the end of a virtual cable; without the rights for it, this one."""
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(_namespace())
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no network namespaces here: {getattr(error, 'stderr', None) or error}")
            loopback = frozenset({"127.0.0.1", "127.0.0.2"})
            hosts = TwoHosts(
                kind="two loopback addresses",
                address="127.0.0.2",
                own_addresses=loopback,
                other_addresses=loopback,
                enter=(),
            )
        print(f"two hosts: {hosts.kind}")
        yield hosts


@contextlib.contextmanager
def _namespace() -> Iterator[TwoHosts]:
    ip = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if ip is None:
        raise FileNotFoundError("there is no `ip`")
    number = os.getpid() % 2**14
    name, ours, theirs = f"wan{number}", f"wan{number}a", f"wan{number}b"
    block = f"198.18.{number // 64}"  # addresses that are set aside for tests of networks
    address, other_address = f"{block}.{number % 64 * 4 + 1}", f"{block}.{number % 64 * 4 + 2}"

    def run(*arguments: str) -> None:
        subprocess.run([ip, *arguments], check=True, capture_output=True, text=True)

    run("netns", "add", name)
    try:
        run("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
        run("address", "add", f"{address}/30", "dev", ours)
        run("link", "set", ours, "up")
        run("-n", name, "address", "add", f"{other_address}/30", "dev", theirs)
        run("-n", name, "link", "set", theirs, "up")
        run("-n", name, "link", "set", "lo", "up")
        run("netns", "exec", name, "true")
        yield TwoHosts(
            kind="two network namespaces",
            address=address,
            own_addresses=frozenset({address}),
            other_addresses=frozenset({other_address}),
            enter=(ip, "netns", "exec", name),
        )
    finally:
        run("netns", "delete", name)  # and with it the cable
