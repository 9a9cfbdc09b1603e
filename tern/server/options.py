"""What the one who starts a server may choose, and the range of each choice. Knows no engine and no model."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass

from tern.errors import OptionError

MIB = 2**20


@dataclass(frozen=True)
class ServerOptions:
    """Where and how a server listens.

    `host`, `port`: the address; port 0 takes a free one. `metrics_port`: serve /metrics there, and only there; 0 takes
    a free one. `api_keys`: a client must send one of them as `Authorization: Bearer KEY`; with none, every client is
    served, and then `host` must be a loopback address unless `allow_public` insists. `served_model_name`: the name
    in the API; None is the name the model was opened with. `max_body_bytes`: longest request body.
    `shutdown_timeout`: seconds that running requests get on SIGTERM. `keep_alive_seconds`: a silent stream gets an SSE
    comment this often, so that no proxy or client takes it for dead. `heartbeat_timeout`: seconds without a sign of
    life after which /health calls the engine hung; it must be longer than the slowest step. `drop_volatile_lines`:
    leave out lines that coding agents put before a system prompt of /v1/messages, other ones with each request, since
    the prefix cache would find nothing behind them.

    Raises `OptionError` that names the option, the value and the limit.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    metrics_port: int | None = None
    api_keys: tuple[str, ...] = ()
    allow_public: bool = False
    served_model_name: str | None = None
    max_body_bytes: int = 32 * MIB
    shutdown_timeout: float = 30.0
    keep_alive_seconds: float = 10.0
    heartbeat_timeout: float = 120.0
    drop_volatile_lines: bool = True

    def __post_init__(self) -> None:
        _port("port", self.port)
        if self.metrics_port is not None:
            _port("metrics_port", self.metrics_port)
            if self.metrics_port == self.port != 0:
                raise OptionError(f"metrics_port is {self.port}, the same as port: choose another, or leave it out.")
        if not all(self.api_keys):
            raise OptionError("An API key is empty: give at least one character.")
        if self.served_model_name == "":
            raise OptionError("served_model_name is empty: give a name, or leave it out.")
        if not 1 <= self.max_body_bytes <= 2**31:
            raise OptionError(f"max_body_bytes is {self.max_body_bytes}: it must be from 1 to {2**31}.")
        _seconds("shutdown_timeout", self.shutdown_timeout, zero=True)
        _seconds("keep_alive_seconds", self.keep_alive_seconds)
        _seconds("heartbeat_timeout", self.heartbeat_timeout)
        if not self.api_keys and not self.allow_public and not is_loopback(self.host):
            raise OptionError(
                f"host is {self.host!r}, which other machines can reach, and there is no API key: set --api-key, "
                "or insist with --allow-public."
            )

    @property
    def curl_key(self) -> str:
        """What a suggested curl command needs beside its other headers: a place for the key, never the key itself."""
        return " -H 'Authorization: Bearer YOUR_KEY'" if self.api_keys else ""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _port(name: str, value: int) -> None:
    if not 0 <= value <= 65535:
        raise OptionError(f"{name} is {value}: it must be from 0 to 65535.")


def _seconds(name: str, value: float, *, zero: bool = False) -> None:
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise OptionError(f"{name} is {value}: it must be a number of seconds, {'0 or more' if zero else 'above 0'}.")
