from contextlib import asynccontextmanager

import pytest

from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import Counters
from fabric.net.config import HostConfig
from fabric.net.libp2p_host import open_host
from fabric.net.memory_host import Conditions, MemoryNetwork
from tests.net.check_host import ListGate, check_host

LOOPBACK = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))


@asynccontextmanager
async def memory_pair():
    conditions = Conditions(latency_seconds=0.05, bytes_per_second=10e6)
    async with MemoryNetwork(1, conditions).run() as network:
        one, two = (network.host(Ed25519Signer.generate(), ListGate()) for _ in "12")
        yield one, two


@asynccontextmanager
async def libp2p_pair():
    one, two = (
        open_host(LOOPBACK, Ed25519Signer.generate(), ListGate(), Counters())
        for _ in "12"
    )
    async with one as first, two as second:
        yield first, second


async def test_the_memory_host_keeps_the_contract(autojump_clock):
    await check_host(memory_pair)


@pytest.mark.slow
async def test_the_libp2p_host_keeps_the_contract():
    await check_host(libp2p_pair)
