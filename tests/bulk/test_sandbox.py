import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fabric.bulk import seccomp, syscalls
from fabric.bulk.sandbox import WorkerLimits, describe, enter
from fabric.core.errors import LocalProtocolError

SCRIPTS = Path(__file__).parent / "worker_scripts"
ENVIRONMENT = {
    "PATH": os.defpath,
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "HF_HUB_OFFLINE": "1",
}

walled = pytest.mark.skipif(
    not describe().complete, reason=f"kernel lacks {describe().lacking}"
)


def run(script: str, *arguments: object, **extra: str) -> str:
    done = subprocess.run(
        [sys.executable, "-I", "-B", str(SCRIPTS / script), *map(str, arguments)],
        env=ENVIRONMENT | extra,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What a hostile worker achieved, by attempt."""
    scratch = tmp_path_factory.mktemp("scratch")
    home = tmp_path_factory.mktemp("home")
    secret = home / "identity.key"
    secret.write_bytes(b"private")
    secret.chmod(0o600)
    with socket.socket(socket.AF_UNIX) as control, socket.socket() as tcp:
        control.bind(str(home / "control.sock"))
        control.listen()
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        port = tcp.getsockname()[1]
        result = run(
            "hostile.py", scratch, secret, home / "control.sock", port, os.getpid()
        )
    assert secret.read_bytes() == b"private"
    assert not (home / "new").exists()
    return json.loads(result)


@walled
def test_a_hostile_worker_achieves_nothing(outcomes):
    refused = dict(outcomes)
    del refused["allowed"], refused["report"]
    assert refused.pop("memory") == "MemoryError"
    achieved = {
        name: what for name, what in refused.items() if what != "PermissionError"
    }
    # Refused by Landlock's own names for it: not on the same device, not there.
    assert achieved.pop("hard_link_to_secret", "OSError") == "OSError"
    assert achieved.pop("rename_secret", "OSError") == "OSError"
    assert achieved == {}


@walled
def test_what_a_worker_needs_still_works(outcomes):
    assert outcomes["allowed"] == "okfine"


@walled
def test_the_report_names_every_wall(outcomes):
    assert outcomes["report"]["lacking"] == []
    assert tuple(outcomes["report"]["enforced"]) == describe().enforced


@walled
@pytest.mark.slow
def test_torch_trains_inside(tmp_path):
    assert run("torch_step.py", tmp_path, TMPDIR=str(tmp_path)) == "True"


def test_a_process_with_threads_is_refused(tmp_path):
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    try:
        if sys.platform == "linux":
            with pytest.raises(LocalProtocolError, match="threads"):
                enter(WorkerLimits(scratch=tmp_path))
    finally:
        release.set()
        thread.join()


def evaluate(program: bytes, arch: int, number: int, *arguments: int) -> int:
    """Run a filter as the kernel would; return its verdict."""
    import struct

    data = struct.pack("=IIQ6Q", number, arch, 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    code = list(struct.iter_unpack("=HBBI", program))
    at = accumulator = 0
    while True:
        operation, if_true, if_false, value = code[at]
        at += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif operation == 0x54:
            accumulator &= value
        elif operation == 0x15:
            at += if_true if accumulator == value else if_false
        elif operation == 0x35:
            at += if_true if accumulator >= value else if_false
        else:
            assert operation == 0x06
            return value


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_of_each_architecture(machine):
    arch, program = syscalls.AUDIT_ARCH[machine], seccomp.build_filter(machine, 77)
    of = syscalls.examined(machine)

    def verdict(number, *arguments):
        return evaluate(program, arch, number, *arguments)

    for name, number in syscalls.refused(machine).items():
        assert verdict(number) == seccomp.REFUSE, name
    assert evaluate(program, arch ^ 1, 0) == seccomp.KILL
    assert verdict(of["clone3"]) == seccomp.ABSENT
    assert verdict(of["clone"], 0x3D0F00) == seccomp.ALLOW
    assert verdict(of["clone"], 0x11) == seccomp.REFUSE
    assert verdict(of["kill"], 77, 9) == seccomp.ALLOW
    assert verdict(of["kill"], 76, 9) == seccomp.REFUSE
    assert verdict(of["kill"], 2**64 - 1, 9) == seccomp.REFUSE
    assert verdict(of["socketpair"], 1, 1 | 0o2000000) == seccomp.ALLOW
    assert verdict(of["socketpair"], 1, 2) == seccomp.REFUSE
    assert verdict(of["prlimit64"], 0) == seccomp.ALLOW
    assert verdict(of["prlimit64"], 1) == seccomp.REFUSE
    named = {*of.values(), *syscalls.refused(machine).values()}
    others = set(range(460)) - named
    assert all(verdict(number) == seccomp.ALLOW for number in others)


def test_x32_calls_do_not_slip_past():
    program = seccomp.build_filter("x86_64", 77)
    arch = syscalls.AUDIT_ARCH["x86_64"]
    assert evaluate(program, arch, 0x40000000 | 41) == seccomp.REFUSE


def test_the_numbers_are_this_machines():
    """Against the numbers that the C library's headers give, where installed."""
    machine = os.uname().machine
    header = Path(f"/usr/include/{machine}-linux-gnu/asm/unistd_64.h")
    if machine not in syscalls.AUDIT_ARCH or not header.exists():
        pytest.skip("no header to compare with")
    words = [line.split() for line in header.read_text().splitlines()]
    numbers = {
        word[1].removeprefix("__NR_"): int(word[2])
        for word in words
        if len(word) == 3 and word[1].startswith("__NR_")
    }
    ours = {**syscalls.refused(machine), **syscalls.examined(machine)}
    assert {name: numbers.get(name, number) for name, number in ours.items()} == ours
