"""The configuration of one node: each package owns its part."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from attestation.config import AttestationConfig
from checkpoints.mesh.config import ReplicationConfig
from crdt_store.config import StoreConfig
from dht.config import ContentConfig
from fabric.app.config_loader import load_config
from fabric.app.home import Home
from fabric.jobs.config import JobsConfig
from fabric.net.config import GossipConfig, HostConfig, RoutingConfig
from fabric.net.data_config import DataConfig
from inference.config import InferenceConfig
from nat.config import NatConfig
from training.config import TrainConfig


class MeshConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How this peer keeps in touch with the members of its mesh."""

    join_seconds: Annotated[float, msgspec.Meta(gt=0, le=600)] = 30.0
    """Longest time from `fabric join` to its answer."""
    connect_seconds: Annotated[float, msgspec.Meta(gt=0, le=600)] = 15.0
    """Longest time for one dial and admission."""
    max_neighbours: Annotated[int, msgspec.Meta(ge=4, le=1000)] = 48
    """Members with which this peer keeps a connection. A larger mesh is connected in
    part, and to the others on demand; use the same number on all peers."""
    idle_seconds: Annotated[float, msgspec.Meta(ge=2, le=3600)] = 60.0
    """A connection with somebody else is closed after so long without use, when there
    are more than ``max_neighbours``."""
    record_refresh_seconds: Annotated[float, msgspec.Meta(ge=60, le=86400)] = 21600.0
    """How often the membership record is written again (TTL 24 h)."""


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything an operator can set, in TOML, ``FABRIC__*`` variables or flags."""

    name: Annotated[str, msgspec.Meta(max_length=100)] = ""
    """Name shown to others; empty takes the machine's."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    mesh: MeshConfig = MeshConfig()
    host: HostConfig = HostConfig()
    gossip: GossipConfig = GossipConfig()
    routing: RoutingConfig = RoutingConfig()
    data: DataConfig = DataConfig()
    nat: NatConfig = NatConfig()
    store: StoreConfig = StoreConfig()
    attestation: AttestationConfig = AttestationConfig()
    content: ContentConfig = ContentConfig()
    replication: ReplicationConfig = ReplicationConfig()
    jobs: JobsConfig = JobsConfig()
    train: TrainConfig = TrainConfig()
    serve: InferenceConfig = InferenceConfig()

    @property
    def display_name(self) -> str:
        """The name shown to others."""
        return self.name or socket.gethostname()

    @property
    def nat_in_budget(self) -> NatConfig:
        """The settings of traversal; relaying takes no more than all may send."""
        all_, relay = self.data.budget.max_up_bytes_per_second, self.nat.relay
        if not all_ or relay.max_bytes_per_second <= all_:
            return self.nat
        less = msgspec.structs.replace(relay, max_bytes_per_second=all_)
        return msgspec.structs.replace(self.nat, relay=less)


def load_node_config(home: Home, flags: Mapping[str, object]) -> NodeConfig:
    """Return the configuration in ``home``, environment and ``flags``.

    Raises:
        ConfigError: unknown key, wrong type or value.
    """
    return load_config(NodeConfig, home.config_file, os.environ, flags)
