"""What a worker may do: the limits, and the walls it puts around itself.

``enter`` runs first in a worker's ``main``, before any code of a job and before the
process starts threads. In this order:

1. no_new_privs, and every capability dropped: root in here is nobody in particular;
2. resource limits: private memory, open files, no core dumps;
3. Landlock (:mod:`fabric.bulk.landlock`): read the interpreter, our packages and
   ``limits.readable``; write ``limits.scratch``; no TCP, no signals to others;
4. seccomp (:mod:`fabric.bulk.seccomp`): no new sockets, processes, mounts, keys.

Known holes: memory shared by an anonymous mapping is not counted by RLIMIT_DATA, and
CPU time is not limited here.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import resource
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from fabric.bulk import landlock, seccomp
from fabric.core.errors import LocalProtocolError, Unavailable

_PACKAGES = ("fabric", "training", "inference", "checkpoints")
"""Top-level packages whose ``worker`` modules and what they import run in a worker."""

_SYSTEM = (
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/lib",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/ssl/openssl.cnf",
    "/etc/localtime",
    "/usr/share/zoneinfo",
    "/proc/self",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/sys/vm/overcommit_memory",
    "/sys/devices/system/cpu",
    "/sys/devices/system/node",
    "/dev/urandom",
)
_DEVICES = ("/dev/null", "/dev/zero")

_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_CAPABILITY_VERSION_3 = 0x20080522
_MAX_CAPABILITY = 63
_SIGKILL = 9


class WorkerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker may use. Enforced by the worker on itself before foreign code runs.

    Landlock paths, no_new_privs, rlimits and a seccomp filter that refuses new network
    sockets (DESIGN section 2).
    """

    scratch: Path
    """The only directory the worker may write."""
    readable: tuple[Path, ...] = ()
    """Read-only directories besides the interpreter and its packages."""
    memory_bytes: int = 8 << 30
    """Private memory above what the interpreter maps at start (RLIMIT_DATA)."""
    open_files: int = 1024
    threads: int = 1
    """torch threads: cores / worker processes."""


class Lack(msgspec.Struct, frozen=True):
    """A wall that does not stand here, and why."""

    feature: str
    reason: str


class SandboxReport(msgspec.Struct, frozen=True):
    """Which walls stand. Code shipped with a job runs only where ``complete``."""

    enforced: tuple[str, ...]
    lacking: tuple[Lack, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every wall stands."""
        return not self.lacking


def describe() -> SandboxReport:
    """Return which walls :func:`enter` would put up here; changes nothing."""
    if sys.platform != "linux":
        return SandboxReport(("rlimits",), tuple(_not_linux()))
    return _report(landlock.abi_version(), filtered=seccomp.available())


def enter(limits: WorkerLimits) -> SandboxReport:
    """Put the walls up around this process, for ever; return which stand.

    Raises:
        LocalProtocolError: the process already has more than one thread, and Landlock
            would not cover the others.
    """
    if sys.platform != "linux":
        _limit_resources(limits)
        return SandboxReport(("rlimits",), tuple(_not_linux()))
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise LocalProtocolError(f"sandbox entered by a process of {threads} threads")
    readable = tuple(_readable(limits))
    _drop_privileges()
    _limit_resources(limits)
    abi = _attempt(
        lambda: landlock.restrict(
            readable, (limits.scratch,), tuple(map(Path, _DEVICES))
        )
    )
    filtered = _attempt(seccomp.install) is not None
    return _report(abi or 0, filtered=filtered)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends.

    Args:
        parent: Process id of the daemon; if it is already gone, the process exits now.
    """
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != parent:
        sys.exit("the daemon is gone")


def _attempt(step: Callable[[], int | None]) -> int | None:
    try:
        return step() or 0
    except Unavailable:
        return None


def _report(abi: int, *, filtered: bool) -> SandboxReport:
    enforced = ["no_new_privs", "no capabilities", "rlimits"]
    lacking = []
    for feature, needed in (
        ("landlock files", 1),
        ("landlock tcp", landlock.ABI_TCP),
        ("landlock signals and abstract sockets", landlock.ABI_SCOPES),
    ):
        if abi >= needed:
            enforced.append(feature)
        else:
            lacking.append(Lack(feature, f"kernel ABI {abi}, needs {needed}"))
    if filtered:
        enforced.append("seccomp")
    else:
        lacking.append(Lack("seccomp", "kernel or architecture without filters"))
    return SandboxReport(tuple(enforced), tuple(lacking))


def _not_linux() -> Iterator[Lack]:
    for feature in ("no_new_privs", "landlock", "seccomp"):
        yield Lack(feature, f"{sys.platform} has no such mechanism")


def _readable(limits: WorkerLimits) -> Iterator[Path]:
    yield from map(Path, _SYSTEM)
    yield Path(sys.base_prefix)
    yield Path(sys.prefix)
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        for location in (spec and spec.submodule_search_locations) or ():
            yield Path(location)
    yield from limits.readable


def _limit_resources(limits: WorkerLimits) -> None:
    mapped = _private_bytes()
    for which, amount in (
        (resource.RLIMIT_DATA, mapped + limits.memory_bytes),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(which)
        if hard != resource.RLIM_INFINITY:
            amount = min(amount, hard)
        resource.setrlimit(which, (amount, amount))


def _private_bytes() -> int:
    """Return what RLIMIT_DATA already counts: data pages in /proc/self/statm."""
    if sys.platform != "linux":
        return 0
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    return pages * resource.getpagesize()


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl {option}: {os.strerror(code)}")


def _drop_privileges() -> None:
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    for capability in range(_MAX_CAPABILITY + 1):
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except OSError:
            break  # EPERM without CAP_SETPCAP, EINVAL above the newest capability
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    if libc.capset(header, b"\0" * 24) != 0:
        raise OSError(ctypes.get_errno(), "capset")
