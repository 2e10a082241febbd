"""A seccomp filter, assembled by hand: system calls that a worker is refused.

The filter is a deny list: what is not named goes on to the kernel's own checks and to
Landlock. A refused call returns EPERM, so that Python reports ``PermissionError``
instead of dying. clone3 returns ENOSYS: its flags are behind a pointer that a filter
cannot follow, and libc falls back to clone, whose flags it can.

Source: linux/Documentation/userspace-api/seccomp_filter.rst,
include/uapi/linux/bpf_common.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct

from fabric.bulk import syscalls
from fabric.core.errors import Unavailable

_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K

_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data

ALLOW = 0x7FFF0000
KILL = 0x80000000
REFUSE = 0x00050000 | errno.EPERM
ABSENT = 0x00050000 | errno.ENOSYS

_X32_CALLS = 0x40000000
_CLONE_THREAD = 0x00010000
_SOCKET_TYPE_MASK = 0xF

_SET_MODE_FILTER, _GET_ACTION_AVAIL, _FLAG_TSYNC = 1, 2, 1
_SECCOMP = {"x86_64": 317, "aarch64": 277}

_libc = ctypes.CDLL(None, use_errno=True)


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value & 0xFFFFFFFF)


def _unless_argument(
    number: int, argument: int, wanted: int, mask: int = 0xFFFFFFFF
) -> bytes:
    """Return code that refuses ``number`` unless (argument & mask) == wanted."""
    return (
        _op(_EQUAL, number, 0, 5)
        + _op(_LOAD, _FIRST_ARGUMENT + 8 * argument)
        + _op(_AND, mask)
        + _op(_EQUAL, wanted, 0, 1)
        + _op(_RETURN, ALLOW)
        + _op(_RETURN, REFUSE)
    )


def build_filter(machine: str, pid: int) -> bytes:
    """Return the filter program (8 bytes an instruction) for process ``pid``.

    Args:
        machine: "x86_64" or "aarch64".
        pid: The only process that signals may be sent to: the worker itself.
    """
    code = [
        _op(_LOAD, _ARCHITECTURE),
        _op(_EQUAL, syscalls.AUDIT_ARCH[machine], 1, 0),
        _op(_RETURN, KILL),  # another architecture's numbers mean other calls
        _op(_LOAD, _NUMBER),
    ]
    if machine == "x86_64":
        code.append(_op(_AT_LEAST, _X32_CALLS, 0, 1) + _op(_RETURN, REFUSE))
    code.extend(
        _op(_EQUAL, number, 0, 1) + _op(_RETURN, REFUSE)
        for number in syscalls.refused(machine).values()
    )
    of = syscalls.examined(machine)
    code.append(_op(_EQUAL, of["clone3"], 0, 1) + _op(_RETURN, ABSENT))
    code.append(_unless_argument(of["clone"], 0, _CLONE_THREAD, _CLONE_THREAD))
    # A datagram pair could address any Unix socket of this user by its path.
    stream = int(socket.SOCK_STREAM)
    code.append(_unless_argument(of["socketpair"], 1, stream, _SOCKET_TYPE_MASK))
    code.extend(
        _unless_argument(of[name], 0, pid)
        for name in ("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo")
    )
    code.extend(
        _unless_argument(of[name], 0, 0) for name in ("prlimit64", "sched_setaffinity")
    )
    code.append(_op(_RETURN, ALLOW))
    return b"".join(code)


def available() -> bool:
    """Return whether the kernel takes filters and we have the machine's numbers."""
    number = _SECCOMP.get(platform.machine())
    if number is None or not hasattr(_libc, "syscall"):
        return False
    action = ctypes.c_uint32(REFUSE & 0xFFFF0000)
    result = _libc.syscall(
        ctypes.c_long(number),
        ctypes.c_uint(_GET_ACTION_AVAIL),
        ctypes.c_uint(0),
        ctypes.byref(action),
    )
    return int(result) == 0


def install() -> None:
    """Put the filter on every thread of this process; no_new_privs must be set.

    Raises:
        Unavailable: the kernel or the architecture has no filter.
    """
    machine = platform.machine()
    if not available():
        raise Unavailable(
            f"no seccomp filter on this kernel ({machine})", code="E_NO_SECCOMP"
        )
    program = build_filter(machine, os.getpid())
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    result = _libc.syscall(
        ctypes.c_long(_SECCOMP[machine]),
        ctypes.c_uint(_SET_MODE_FILTER),
        ctypes.c_uint(_FLAG_TSYNC),
        header,
    )
    if result != 0:
        raise Unavailable(
            f"seccomp filter refused: {os.strerror(ctypes.get_errno())}",
            code="E_NO_SECCOMP",
        )
