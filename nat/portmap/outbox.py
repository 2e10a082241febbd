"""What a port mapper wants done, in order, until the shell takes it."""

from __future__ import annotations

from dataclasses import dataclass

from nat.portmap.api import Event
from nat.portmap.upnp_messages import UpnpRequest


@dataclass(frozen=True)
class SendDatagram:
    """Send to UDP port 5351 of the gateway."""

    data: bytes


@dataclass(frozen=True)
class CallUpnp:
    """Do ``request`` after those before it, and answer with the same ``token``.

    The token names the network: an answer from a network we left is ignored.
    """

    token: int
    request: UpnpRequest


Command = SendDatagram | CallUpnp


class Outbox:
    """Commands and events that wait to be taken; a step leaves a few per port."""

    def __init__(self) -> None:
        self._commands: list[Command] = []
        self._events: list[Event] = []
        self.token = 0

    def send(self, data: bytes) -> None:
        """Add a datagram."""
        self._commands.append(SendDatagram(data))

    def call(self, request: UpnpRequest) -> None:
        """Add a UPnP call on this network."""
        self._commands.append(CallUpnp(self.token, request))

    def emit(self, event: Event) -> None:
        """Add an event."""
        self._events.append(event)

    def next_network(self) -> None:
        """Drop commands for the network we left; its answers come too late now."""
        self.token += 1
        self._commands.clear()

    def take_commands(self) -> list[Command]:
        """Return the commands, once."""
        taken, self._commands = self._commands, []
        return taken

    def take_events(self) -> list[Event]:
        """Return the events, once."""
        taken, self._events = self._events, []
        return taken
