"""A node in this process: what a join that does not end well leaves behind."""

import time

import pytest
import trio

from crdt_store.grants import create_mesh
from crdt_store.invites import make_invite
from fabric.app.config import load_node_config
from fabric.app.home import Home
from fabric.app.node import Node
from fabric.core.errors import NoRoute
from fabric.core.signing import Ed25519Signer

pytestmark = [pytest.mark.slow]


@pytest.fixture
def node(short_dir):
    home = Home.find(short_dir)
    home.create()
    flags = {"host.listen": ("/ip4/127.0.0.1/tcp/0",)}
    return Node(home, load_node_config(home, flags), Ed25519Signer.generate())


def token_to(addr):
    """Return an invite to a mesh whose only member is said to be at ``addr``."""
    owner = Ed25519Signer.generate()
    mesh, _ = create_mesh("lab", Ed25519Signer.generate(), owner.peer_id, time.time())
    addrs = [f"{addr}/p2p/{owner.peer_id}"]
    return make_invite(owner, mesh, addrs, now=time.time())[0]


async def silent(stream):
    await trio.sleep_forever()


async def test_a_join_that_fails_or_is_given_up_leaves_room_for_another(node):
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(node.run)
            with pytest.raises(NoRoute):
                await node.join(token_to("/ip4/127.0.0.1/tcp/1"))
            assert node.session is None
            ears, *_ = await nursery.start(trio.serve_tcp, silent, 0)
            token = token_to(f"/ip4/127.0.0.1/tcp/{ears.socket.getsockname()[1]}")
            with trio.CancelScope() as client:  # who asked hangs up
                nursery.start_soon(hang_up_in_session, node, client)
                await node.join(token)
            assert client.cancelled_caught
            assert node.session is None
            assert not node.joining
            with pytest.raises(NoRoute):  # not: "belongs to a mesh already"
                await node.join(token_to("/ip4/127.0.0.1/tcp/1"))
            nursery.cancel_scope.cancel()


async def hang_up_in_session(node, client):
    while node.session is None:  # noqa: ASYNC110
        await trio.sleep(0.01)
    client.cancel()
