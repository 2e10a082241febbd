"""A sandboxed worker still makes keys, loads them and authenticates."""

import subprocess
import sys

import pytest

WORKER = """
import socket, sys, threading, time
from pathlib import Path
from fabric.bulk import sandbox
from fabric.bulk.certificates import (
    JobStatement, issue_job_certificate, job_credentials, make_worker_key)
from fabric.bulk.tls import handshake
from fabric.core.signing import Ed25519Signer

def worker(now):
    pem, spki = make_worker_key()
    claim = JobStatement("j", 1, spki, int(now), int(now) + 600)
    signer = Ed25519Signer.generate()
    return job_credentials(pem, issue_job_certificate(signer, claim, now))

left, right = socket.socketpair()
sandbox.enter(sandbox.WorkerLimits(scratch=Path(sys.argv[1])))
one, two = worker(time.time()), worker(time.time())
got = []
def accept():
    tls = handshake(right, two, one.der, server=True, timeout_seconds=5)
    got.append(tls.recv(2))
thread = threading.Thread(target=accept)
thread.start()
tls = handshake(left, one, two.der, server=False, timeout_seconds=5)
tls.sendall(b"hi")
thread.join()
assert got == [b"hi"]
assert not {"trio", "libp2p", "torch"} & set(sys.modules)
print("authenticated")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
def test_handshake_inside_the_sandbox(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-c", WORKER, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.stdout == "authenticated\n", done.stderr
