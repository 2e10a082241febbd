"""Ports survive a restart when they are free, and nothing else changes."""

import socket

from fabric.app.last_ports import LastPorts, load_ports, save_ports, settle
from fabric.net.config import HostConfig
from fabric.net.data_config import DataConfig


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_last_ports_are_taken_again(tmp_path):
    control, data = free_port(), free_port()
    path = tmp_path / "ports.json"
    save_ports(path, LastPorts(control, data))
    host = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
    host, plane = settle(host, DataConfig(), load_ports(path))
    assert host.listen == (f"/ip4/127.0.0.1/tcp/{control}",)
    assert plane.listen == f"127.0.0.1:{data}"


def test_a_taken_port_is_left_to_its_owner():
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        host = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
        settled, plane = settle(host, DataConfig(), LastPorts(taken, taken))
        assert settled.listen == host.listen
        assert plane.listen == "127.0.0.1:0"


def test_what_the_operator_chose_stays():
    host = HostConfig(listen=("/ip4/0.0.0.0/tcp/4801",))
    settled, plane = settle(host, DataConfig(listen="127.0.0.1:9"), LastPorts(5, 6))
    assert settled.listen == host.listen
    assert plane.listen == "127.0.0.1:9"
    _, plane = settle(host, DataConfig(), LastPorts())
    assert plane.listen == "0.0.0.0:0"  # where the control plane listens
    _, plane = settle(host, DataConfig(listen="nonsense"), LastPorts(5, 6))
    assert plane.listen == "nonsense"  # refused with its reason when it is bound


def test_the_data_plane_listens_wherever_the_control_plane_does():
    host = HostConfig(listen=("/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/2"))
    _, plane = settle(host, DataConfig(), LastPorts())
    assert plane.listen == "127.0.0.1:0,[::1]:0"
    port = free_port()
    _, plane = settle(host, DataConfig(), LastPorts(0, port))
    assert plane.listen == f"127.0.0.1:{port},[::1]:{port}"
    _, plane = settle(host, DataConfig(listen="127.0.0.1:0, [::1]:7"), LastPorts())
    assert plane.listen == "127.0.0.1:0,[::1]:7"


def test_a_damaged_file_knows_no_ports(tmp_path):
    path = tmp_path / "ports.json"
    for content in (b"", b"{", b'{"control": 70000}', b"\xff" * 2000):
        path.write_bytes(content)
        assert load_ports(path) == LastPorts()
    assert load_ports(tmp_path / "none") == LastPorts()
