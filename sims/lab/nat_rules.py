"""The nftables rules of a gateway: ``ext`` outside, ``lan`` inside.

Linux translates endpoint-dependently in principle, yet keeps the private port whenever
the public tuple is free: for one flow per private port that *is* endpoint-independent
mapping (RFC 5382, REQ-1). Filtering is address and port dependent by nature of
conntrack; weaker filtering is made of a set of addresses that a mapping has talked to,
and DNAT.
"""

from __future__ import annotations

from sims.lab.topology import Behaviour, Filtering, Mapping

REMAP_BIT = 0x0400
"""Flipped in the port after translation: a one-to-one map without fixed points."""
SEQUENTIAL_PORTS = range(20_000, 22_048)
"""Public ports of a sequential NAT, one per new flow, then from the start again."""


def rules_of(behaviour: Behaviour) -> str:
    """Return the gateway's rules as input for ``nft -f -``."""
    tables = [_filter_table(behaviour), _nat_table(behaviour.mapping)]
    if behaviour.filtering in (Filtering.INDEPENDENT, Filtering.ADDRESS):
        by_address = behaviour.filtering is Filtering.ADDRESS
        tables.append(_inbound_table(by_address=by_address))
    if behaviour.mapping is Mapping.REMAPPED:
        tables.append(_remap_table())
    return "\n".join(tables)


def _filter_table(behaviour: Behaviour) -> str:
    outbound = 'iifname "lan" oifname "ext"'
    if behaviour.only_port:
        allowed = f"{outbound} tcp dport {behaviour.only_port} accept"
    elif behaviour.udp:
        allowed = f"{outbound} accept"
    else:
        allowed = f"{outbound} meta l4proto != udp accept"
    # what conntrack cannot place comes here: silence is the policy, RST the exception
    unsolicited = (
        'iifname "ext" meta l4proto tcp reject with tcp reset'
        if behaviour.resets
        else ""
    )
    return f"""
table ip gateway {{
  chain input {{
    type filter hook input priority filter; policy drop;
    iifname "lo" accept
    iifname "lan" accept
    ct state established,related accept
    {unsolicited}
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    ct status dnat accept
    {allowed}
  }}
}}"""


def _nat_table(mapping: Mapping) -> str:
    if mapping is Mapping.SEQUENTIAL:
        ports = enumerate(SEQUENTIAL_PORTS)
        table = ", ".join(f"{index} : {port}" for index, port in ports)
        count = len(SEQUENTIAL_PORTS)
        choose = f"masquerade to :numgen inc mod {count} map {{ {table} }}"
    elif mapping is Mapping.RANDOM:
        choose = "masquerade fully-random"
    else:
        choose = "masquerade"
    return f"""
table ip translate {{
  chain postrouting {{
    type nat hook postrouting priority srcnat;
    oifname "ext" meta l4proto {{ tcp, udp }} {choose}
    oifname "ext" masquerade
  }}
}}"""


def _inbound_table(*, by_address: bool) -> str:
    """Let in whom conntrack alone would not, to the host that owns the port."""
    entry = "ip daddr . meta l4proto . th sport"
    learn = f"update @contacts {{ {entry} }}" if by_address else ""
    known = "ip saddr . meta l4proto . th dport @contacts" if by_address else ""
    return f"""
table ip inbound {{
  map owners {{
    type inet_proto . inet_service : ipv4_addr
    flags dynamic,timeout
    timeout 1h
    size 65536
  }}
  set contacts {{
    type ipv4_addr . inet_proto . inet_service
    flags dynamic,timeout
    timeout 1h
    size 65536
  }}
  chain learn {{
    type filter hook postrouting priority mangle;
    oifname "ext" ct state new meta l4proto {{ tcp, udp }} \
update @owners {{ meta l4proto . th sport : ip saddr }} {learn}
  }}
  chain prerouting {{
    type nat hook prerouting priority dstnat;
    iifname "ext" {known} dnat to meta l4proto . th dport map @owners
  }}
}}"""


def _remap_table() -> str:
    """Change the public port outside of conntrack's sight, both ways."""
    return f"""
table ip remap {{
  chain outbound {{
    type filter hook postrouting priority 200;
    oifname "ext" meta l4proto {{ tcp, udp }} th sport set th sport ^ {REMAP_BIT}
  }}
  chain inbound {{
    type filter hook prerouting priority -310;
    iifname "ext" meta l4proto {{ tcp, udp }} th dport set th dport ^ {REMAP_BIT}
  }}
}}"""
