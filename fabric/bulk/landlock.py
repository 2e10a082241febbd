"""Landlock: this process gives up file, TCP, signal and abstract-socket access.

A ruleset names the rights it *handles*; what it handles is denied except where a rule
allows it. Restricting covers the calling thread and its later children only, so it must
happen before the process starts threads. It needs no privilege, holds for root too, and
cannot be undone.

Source: linux/Documentation/userspace-api/landlock.rst, include/uapi/linux/landlock.h.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from fabric.core.errors import Unavailable

# The same numbers on every architecture: syscalls added since 5.1 are unified.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG = 1
_RULE_PATH_BENEATH = 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE = 1 << 4, 1 << 5
MAKE_DIR, MAKE_REG = 1 << 7, 1 << 8
REFER, TRUNCATE = 1 << 13, 1 << 14

READ = EXECUTE | READ_FILE | READ_DIR
# No MAKE_SYM: the daemon reads scratch, and must not be led through a link to a file
# that only the daemon may read.
READ_WRITE = (
    READ_FILE
    | READ_DIR
    | WRITE_FILE
    | REMOVE_DIR
    | REMOVE_FILE
    | MAKE_DIR
    | MAKE_REG
    | REFER
    | TRUNCATE
)
_FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
"""The rights that a rule on something other than a directory may name."""

# Rights known at each ABI: bits 0-12 from 1, REFER from 2, TRUNCATE 3, IOCTL_DEV 5.
_FS_BITS = {1: 13, 2: 14, 3: 15, 4: 15}
_FS_BITS_NEWEST = 16
_TCP_BIND_AND_CONNECT = 0b11
_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11
ABI_TCP, ABI_SCOPES = 4, 6

_libc = ctypes.CDLL(None, use_errno=True)


def _syscall(number: int, *arguments: object) -> int:
    ctypes.set_errno(0)
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def abi_version() -> int:
    """Return the kernel's Landlock ABI, 0 when it has none or has it switched off."""
    try:
        return _syscall(
            _CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION_FLAG)
        )
    except OSError:
        return 0


def restrict(
    readable: Iterable[Path], writable: Iterable[Path], devices: Iterable[Path]
) -> int:
    """Deny this thread and its children everything but the given paths; return the ABI.

    TCP bind and connect are denied from ABI 4, signals to and abstract sockets of
    processes outside from ABI 6. Paths that do not exist are skipped.

    Args:
        readable: Files and trees to read and execute.
        writable: Trees to read and write, without making links, devices or sockets.
        devices: Files to read and write.

    Raises:
        Unavailable: the kernel has no Landlock.
    """
    abi = abi_version()
    if abi == 0:
        raise Unavailable("the kernel has no Landlock", code="E_NO_LANDLOCK")
    handled = (1 << _FS_BITS.get(abi, _FS_BITS_NEWEST)) - 1
    attributes = struct.pack(
        "=QQQ",
        handled,
        _TCP_BIND_AND_CONNECT if abi >= ABI_TCP else 0,
        _ABSTRACT_SOCKETS_AND_SIGNALS if abi >= ABI_SCOPES else 0,
    )
    size = 24 if abi >= ABI_SCOPES else 16 if abi >= ABI_TCP else 8
    ruleset = _syscall(
        _CREATE_RULESET, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0)
    )
    try:
        for rights, paths in (
            (READ, readable),
            (READ_WRITE, writable),
            (READ_FILE | WRITE_FILE, devices),
        ):
            for path in paths:
                _allow(ruleset, path, rights & handled)
        _syscall(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)
    return abi


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # nothing there, or already out of our reach: nothing to allow
    try:
        if not path.is_dir():
            rights &= _FILE_RIGHTS
        rule = struct.pack("=Qi", rights, parent)
        _syscall(
            _ADD_RULE,
            ctypes.c_int(ruleset),
            ctypes.c_int(_RULE_PATH_BENEATH),
            rule,
            ctypes.c_uint32(0),
        )
    finally:
        os.close(parent)
