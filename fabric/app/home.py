"""Where one peer keeps its files: XDG directories, or all under ``FABRIC_HOME``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from fabric.core.errors import ConfigError

MAX_SOCKET_PATH_BYTES = 107
"""sun_path of unix(7) holds 108 bytes with its terminating zero."""


@dataclass(frozen=True)
class Home:
    """The directories of one peer.

    Attributes:
        config_file: TOML configuration; need not exist.
        data: Identity, replicated state, content: survives; back it up.
        state: Logs and job scratch; can be deleted while the daemon is down.
    """

    config_file: Path
    data: Path
    state: Path

    @classmethod
    def find(cls, explicit: Path | None = None) -> Home:
        """Return the home in ``explicit``, else ``$FABRIC_HOME``, else XDG's."""
        root = explicit or (
            Path(os.environ["FABRIC_HOME"]) if "FABRIC_HOME" in os.environ else None
        )
        if root is not None:
            root = root.expanduser().absolute()
            return cls(root / "config.toml", root / "data", root / "state")
        return cls(
            Path(platformdirs.user_config_dir("fabric")) / "config.toml",
            Path(platformdirs.user_data_dir("fabric")),
            Path(platformdirs.user_state_dir("fabric")),
        )

    @property
    def identity_file(self) -> Path:
        """32-byte Ed25519 seed, mode 0600."""
        return self.data / "identity.key"

    @property
    def mesh_file(self) -> Path:
        """Which mesh this peer belongs to."""
        return self.data / "mesh.json"

    @property
    def control_socket(self) -> Path:
        """Unix socket of the control API, mode 0600."""
        return self.data / "control.sock"

    @property
    def jobs(self) -> Path:
        """Scratch directories of jobs."""
        return self.state / "jobs"

    @property
    def log_file(self) -> Path:
        """The daemon's log."""
        return self.state / "daemon.log"

    def create(self) -> None:
        """Make the directories, readable by their owner only.

        Raises:
            ConfigError: not possible, or the path is too long for a Unix socket.
        """
        length = len(os.fsencode(self.control_socket))
        if length > MAX_SOCKET_PATH_BYTES:
            raise ConfigError(
                f"{self.control_socket} has {length} bytes; a Unix socket path may "
                f"have {MAX_SOCKET_PATH_BYTES}",
                next_step="choose a shorter directory with --home or FABRIC_HOME",
            )
        try:
            for directory in (self.data, self.state, self.jobs):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise ConfigError(
                f"cannot create {exc.filename}: {exc.strerror}",
                next_step="make it writable, or choose another with --home",
            ) from exc
