"""The model of a laboratory network: sites, the NAT in front of each, their links."""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

from fabric.core.errors import ConfigError

MAX_SITES = 250
"""The site's number is one octet of its addresses."""
MAX_HOSTS = 100
"""Behind one gateway: .10 to .109."""
PUBLIC_BITS = 16
"""Every site has a /24 of its own, all of them on one link: 80.80.0.0/16."""


class Mapping(enum.Enum):
    """How a NAT chooses the public port of a flow (RFC 4787, 4.1; RFC 5382, 4.1)."""

    NONE = "none"
    """No translation: a public address."""
    INDEPENDENT = "independent"
    """The same for every destination, equal to the private port where it is free."""
    REMAPPED = "remapped"
    """The same for every destination, but never equal to the private port."""
    RANDOM = "random"
    """Another one for every destination ("symmetric"), drawn at random."""
    SEQUENTIAL = "sequential"
    """Another one for every destination, each one more than the last."""

    @property
    def independent(self) -> bool:
        """Whether one observer's answer holds for all other destinations."""
        return self in (Mapping.NONE, Mapping.INDEPENDENT, Mapping.REMAPPED)


class Filtering(enum.Enum):
    """Whom a NAT lets in through a mapping (RFC 4787, 5; RFC 5382, 4.3)."""

    NONE = "none"
    """Everybody, always."""
    INDEPENDENT = "independent"
    """Everybody, once the mapping exists ("full cone")."""
    ADDRESS = "address"
    """Addresses to which the mapping has sent something, from any of their ports."""
    ADDRESS_AND_PORT = "address_and_port"
    """Endpoints to which the mapping has sent something."""


class Behaviour(msgspec.Struct, frozen=True, kw_only=True):
    """What stands between a host and the public network.

    Attributes:
        mapping: How public ports are chosen.
        filtering: Whom the outermost gateway lets in.
        resets: Whether an unsolicited SYN is answered with RST (else silence).
        udp: Whether UDP leaves the site.
        only_port: The only TCP port that may be dialled outside; 0 allows all.
        layers: Gateways in a row.
    """

    mapping: Mapping = Mapping.INDEPENDENT
    filtering: Filtering = Filtering.ADDRESS_AND_PORT
    resets: bool = False
    udp: bool = True
    only_port: int = 0
    layers: int = 1


class NatKind(enum.StrEnum):
    """The kinds of a site's connection to the public network."""

    NONE = "none"
    FULL_CONE = "full_cone"
    CONE_ADF = "cone_adf"
    CONE = "cone"
    CONE_REMAP = "cone_remap"
    RST = "rst"
    SYMMETRIC = "symmetric"
    SYMMETRIC_SEQ = "symmetric_seq"
    CGNAT = "cgnat"
    UDP_BLOCKED = "udp_blocked"
    ONLY_443 = "only_443"

    @property
    def behaviour(self) -> Behaviour:
        """What the kind does."""
        return _BEHAVIOUR[self]


_BEHAVIOUR = {
    NatKind.NONE: Behaviour(mapping=Mapping.NONE, filtering=Filtering.NONE, layers=0),
    NatKind.FULL_CONE: Behaviour(filtering=Filtering.INDEPENDENT),
    NatKind.CONE_ADF: Behaviour(filtering=Filtering.ADDRESS),
    NatKind.CONE: Behaviour(),
    NatKind.CONE_REMAP: Behaviour(mapping=Mapping.REMAPPED),
    NatKind.RST: Behaviour(resets=True),
    NatKind.SYMMETRIC: Behaviour(mapping=Mapping.RANDOM),
    NatKind.SYMMETRIC_SEQ: Behaviour(mapping=Mapping.SEQUENTIAL),
    NatKind.CGNAT: Behaviour(layers=2),
    NatKind.UDP_BLOCKED: Behaviour(udp=False),
    NatKind.ONLY_443: Behaviour(udp=False, only_port=443),
}


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """A site's uplink, both ways.

    Attributes:
        rate_mbit: Megabits per second each way; 0 does not limit.
        delay_seconds: One way; two such sites are four delays of a round trip apart.
        loss: Share of frames that vanish, drawn from the topology's seed.
        queue_bytes: What a delayed link holds at once; more is dropped.
    """

    rate_mbit: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    delay_seconds: Annotated[float, msgspec.Meta(ge=0, le=10)] = 0.0
    loss: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    queue_bytes: Annotated[int, msgspec.Meta(gt=0)] = 16 << 20

    @property
    def is_carried(self) -> bool:
        """Whether frames pass through a process of ours, not through the kernel."""
        return self.delay_seconds > 0 or self.loss > 0


class IpVersions(enum.StrEnum):
    """What a site's uplink carries.

    IPv6 is never translated nor filtered, as in a home whose router opens it.
    """

    V4 = "4"
    V6 = "6"
    BOTH = "both"

    @property
    def has_ip4(self) -> bool:
        """Whether there is IPv4."""
        return self is not IpVersions.V6

    @property
    def has_ip6(self) -> bool:
        """Whether there is IPv6."""
        return self is not IpVersions.V4


class Site(msgspec.Struct, frozen=True, kw_only=True):
    """One connection to the public network and the hosts behind it.

    Attributes:
        name: Also the name of its host; several are called ``name-0``, ``name-1``.
        kind: What stands in front.
        hosts: How many; a site of kind ``none`` has one.
        shape: Rate, delay and loss of its uplink.
        lan: Third octet of its private network 192.168.x.0/24; 0 takes the site's
            number. Homes with equal networks are common: give several the same.
        ip: IPv4, IPv6 or both.
    """

    name: str
    kind: NatKind = NatKind.NONE
    hosts: int = 1
    shape: Shape = Shape()
    lan: int = 0
    ip: IpVersions = IpVersions.V4

    @property
    def host_names(self) -> tuple[str, ...]:
        """Return the names of its hosts."""
        if self.hosts == 1:
            return (self.name,)
        return tuple(f"{self.name}-{i}" for i in range(self.hosts))


class Topology(msgspec.Struct, frozen=True, kw_only=True):
    """A public network and its sites.

    Attributes:
        sites: Numbered from 1 in this order.
        seed: Of the losses.
        net6: First two groups of every IPv6 address; "fd00:1ab" makes them private.
    """

    sites: tuple[Site, ...]
    seed: int = 1
    net6: str = "2001:db8"

    @property
    def has_ip6(self) -> bool:
        """Whether any site has IPv6."""
        return any(site.ip.has_ip6 for site in self.sites)

    def check(self) -> None:
        """Refuse what cannot be built.

        Raises:
            ConfigError: too many sites or hosts, or a name used twice.
        """
        names = [name for site in self.sites for name in site.host_names]
        if not 0 < len(self.sites) <= MAX_SITES:
            raise ConfigError(f"{len(self.sites)} sites: 1 to {MAX_SITES} are possible")
        if len(set(names)) < len(names):
            raise ConfigError("two hosts of the laboratory have the same name")
        for site in self.sites:
            most = 1 if site.kind is NatKind.NONE else MAX_HOSTS
            if not 0 < site.hosts <= most:
                raise ConfigError(f"{site.name}: {site.hosts} hosts, at most {most}")
            gateways = site.kind.behaviour.layers
            if gateways and not site.ip.has_ip4:
                raise ConfigError(f"{site.name}: a gateway translates IPv4")
            if gateways > 1 and site.ip.has_ip6:
                raise ConfigError(f"{site.name}: IPv6 passes one gateway at most")
            if not site.name.replace("-", "").replace("_", "").isalnum():
                raise ConfigError(f"{site.name!r}: letters, digits, - and _ only")

    def number(self, name: str) -> int:
        """Return the number of the site called ``name``.

        Raises:
            ConfigError: there is none.
        """
        for number, site in enumerate(self.sites, 1):
            if site.name == name:
                return number
        known = ", ".join(site.name for site in self.sites)
        raise ConfigError(f"no site {name!r}", next_step=f"sites: {known}")

    def site(self, name: str) -> Site:
        """Return the site called ``name``."""
        return self.sites[self.number(name) - 1]

    def site_of(self, host: str) -> Site:
        """Return the site of the host called ``host``.

        Raises:
            ConfigError: there is none.
        """
        for site in self.sites:
            if host in site.host_names:
                return site
        raise ConfigError(f"no host {host!r} in the laboratory")
