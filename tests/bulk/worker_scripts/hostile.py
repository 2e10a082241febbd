"""A worker that tries everything it must not; prints what happened as JSON."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import msgspec

from fabric.bulk.sandbox import WorkerLimits, enter

scratch, secret, control, tcp_port, parent = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
held = socket.socket()
held.connect(("127.0.0.1", int(tcp_port)))
report = enter(WorkerLimits(scratch=Path(scratch), memory_bytes=256 << 20))


def raw(*arguments):
    ctypes.set_errno(0)
    if libc.syscall(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "syscall")


def libc_call(name, *arguments):
    ctypes.set_errno(0)
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)


def reconnect():
    """A handed socket, told to forget its peer, must not dial another."""
    libc_call("connect", held.fileno(), b"\0" * 16, 16)


def fork():
    if os.fork() == 0:
        os._exit(0)


def datagram_pair():
    left, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    left.sendto(b"x", control)


def thread_opens_secret():
    caught = []

    def attempt():
        try:
            Path(secret).read_bytes()
        except OSError as exc:
            caught.append(exc)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    if caught:
        raise caught[0]


ATTEMPTS = {
    "read_secret": lambda: Path(secret).read_bytes(),
    "read_secret_in_thread": thread_opens_secret,
    "list_secret_dir": lambda: os.listdir(Path(secret).parent),
    "read_secret_by_proc": lambda: Path(f"/proc/{parent}/root{secret}").read_bytes(),
    "link_to_secret": lambda: os.symlink(secret, Path(scratch, "link")),
    "hard_link_to_secret": lambda: os.link(secret, Path(scratch, "hard")),
    "rename_secret": lambda: os.rename(secret, Path(scratch, "moved")),
    "write_outside": lambda: Path(secret).with_name("new").write_bytes(b"x"),
    "write_package": lambda: Path(os.__file__).with_name("planted.py").write_bytes(b""),
    "connect_control": lambda: socket.socket(socket.AF_UNIX).connect(control),
    "tcp": lambda: socket.create_connection(("127.0.0.1", int(tcp_port)), 1),
    "udp": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "reconnect_handed": reconnect,
    "datagram_pair": datagram_pair,
    "ptrace": lambda: libc_call("ptrace", 16, int(parent), 0, 0),
    "signal_parent": lambda: os.kill(int(parent), signal.SIGTERM),
    "signal_everyone": lambda: os.kill(-1, signal.SIGTERM),
    "parent_memory": lambda: os.open(f"/proc/{parent}/mem", os.O_RDONLY),
    "parent_environment": lambda: Path(f"/proc/{parent}/environ").read_bytes(),
    "parent_limits": lambda: __import__("resource").prlimit(int(parent), 7, (3, 3)),
    "pidfd": lambda: os.pidfd_open(int(parent)),
    "fork": fork,
    "execute": lambda: subprocess.run(["/bin/true"], check=True),
    "new_session": os.setsid,
    "memfd": lambda: os.memfd_create("x"),
    "keyring": lambda: raw(250 if os.uname().machine == "x86_64" else 219, 0, -4, 1),
    "io_uring": lambda: raw(425, 1, 0),
    "memory": lambda: bytearray(1 << 30),
}

outcomes = {}
for name, attempt in ATTEMPTS.items():
    try:
        attempt()
    except (OSError, MemoryError) as exc:
        outcomes[name] = type(exc).__name__
    else:
        outcomes[name] = "succeeded"

# What must go on working.
Path(scratch, "sub").mkdir()
Path(scratch, "sub", "file").write_bytes(b"fine")
os.replace(Path(scratch, "sub", "file"), Path(scratch, "file"))
left, right = socket.socketpair()
left.sendall(b"ok")
thread = threading.Thread(target=bytearray)
thread.start()
thread.join()
held.sendall(b"hello")
outcomes["allowed"] = right.recv(2).decode() + Path(scratch, "file").read_text()
outcomes["report"] = msgspec.to_builtins(report)
print(json.dumps(outcomes))
