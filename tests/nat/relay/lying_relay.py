"""Peers whose hop protocol does what a test wants."""

from contextlib import asynccontextmanager

from fabric.net.delimited import receive_message_untrusted
from nat.relay.messages import (
    MAX_RELAY_MESSAGE_BYTES,
    PROTOCOL_HOP,
    PROTOCOL_STOP,
    HopStatus,
    Reservation,
    Status,
    StopConnect,
    decode_stop_untrusted,
    encode_hop,
    encode_stop,
)
from tests.nat.relay.relay_network import peer


def held(who):
    return {each.relay for each in who.circuits.reservations.status() if each.held}


def status(who):
    return who.circuits.reservations.status()


@asynccontextmanager
async def fake_relay(answer):
    """A peer whose hop protocol does what a test wants."""
    async with peer() as made:
        made.host.set_handler(PROTOCOL_HOP, answer)
        yield made


class LyingRelay:
    """Grants reservations, and opens stop streams as the test says."""

    def __init__(self, made, **reservation):
        self.made = made
        self.reservation = {"expires_unix_seconds": 2_000_000_000, **reservation}
        made.host.set_handler(PROTOCOL_HOP, self.serve)

    async def serve(self, peer, stream):
        await receive_message_untrusted(stream, MAX_RELAY_MESSAGE_BYTES)
        granted = Reservation(**self.reservation)
        await stream.send_all(
            encode_hop(HopStatus(status=Status.OK, reservation=granted))
        )

    async def stop(self, target, claimed, first=b""):
        """Open a circuit in ``claimed``'s name; return the stream and the answer."""
        stream = await self.made.host.open_stream(target, PROTOCOL_STOP)
        await stream.send_all(encode_stop(StopConnect(claimed)) + first)
        body = await receive_message_untrusted(stream, MAX_RELAY_MESSAGE_BYTES)
        return stream, decode_stop_untrusted(body)
