"""A spec as the mesh keeps it: signed by its submitter, so nobody submits for others.

Any member renews the spec of a job whose submitter is away, so the slot's author proves
nothing. What a submitter may do (settings, code of its own) hangs on this signature.
"""

from __future__ import annotations

from functools import lru_cache

from msgspec.structs import replace

from fabric.core.digest import hex_digest
from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import JobId, public_key_of
from fabric.core.signing import DOMAIN_JOB, Signer, verify
from fabric.jobs.spec import CODEC, JobSpec


def sign_spec(spec: JobSpec, signer: Signer, nonce: str) -> JobSpec:
    """Return ``spec`` as ``signer`` submits it; ``nonce`` tells equal ones apart."""
    ours = replace(spec, submitter=signer.peer_id, nonce=nonce, signature=b"")
    return replace(ours, signature=signer.sign(DOMAIN_JOB, CODEC.encode(ours)))


@lru_cache(maxsize=4096)
def read_spec_untrusted(job: JobId, raw: bytes) -> JobSpec:
    """Return the spec of ``job`` that somebody published.

    Raises:
        RemoteProtocolError: it is none, another job's, or not its submitter's.
    """
    spec = CODEC.decode_untrusted(raw)
    if hex_digest(raw) != job:
        raise RemoteProtocolError(f"not the spec of job {job[:12]}")
    signed = CODEC.encode(replace(spec, signature=b""))
    key = public_key_of(spec.submitter)
    if not verify(key, DOMAIN_JOB, signed, spec.signature):
        raise RemoteProtocolError(
            f"the spec of job {job[:12]} is not signed by its submitter"
        )
    return spec
