"""Settings: every knob of the server beside the model's, as options of the command."""

from __future__ import annotations

import ipaddress
from contextlib import suppress
from dataclasses import dataclass

from megatron_infer.checks import finite, int_in, option


@dataclass(frozen=True)
class Settings:
    """How the server listens, whom it admits and how much it takes. Refuses what would be unsafe (ValueError)."""

    host: str = option("127.0.0.1", "address to listen on; any but a loopback address needs an API key")
    port: int = option(8012, "port; 0 takes a free one")
    api_key: tuple[str, ...] = option((), "key that every request but /health must bring")
    api_key_file: str | None = option(None, "file with one API key per line, out of sight of other users")
    model_alias: str | None = option(None, "name of the model in answers (default: its directory's)")
    parse_special: bool = option(False, "control tokens written out in a prompt are control tokens, for templates")
    max_queued: int = option(256, "completions that may wait while max_num_seqs are computed; more get 503")
    max_wait_seconds: float = option(60.0, "503 where a completion is expected to wait longer")
    max_choices: int = option(64, "completions of one request: prompts times n")
    max_body_bytes: int = option(16 << 20, "longest request body")
    late_seconds: float = option(30.0, "/health answers 503 while a step takes longer")
    drain_seconds: int = option(30, "how long requests in hand may go on after SIGTERM")
    ping_seconds: float = option(5.0, "a stream without news says so this often")

    def __post_init__(self) -> None:
        int_in("port", self.port, 0, 65535)
        for name, low in (("max_queued", 0), ("drain_seconds", 0), ("max_choices", 1), ("max_body_bytes", 1)):
            int_in(name, getattr(self, name), low, 2**31 - 1)
        for name in ("max_wait_seconds", "late_seconds", "ping_seconds"):
            finite(name, getattr(self, name), low=0.001)
        for key in self.api_key:
            if not key.strip() or not key.isascii():
                raise ValueError("an API key must be ASCII text, and not empty")
        is_loopback = self.host == "localhost"
        with suppress(ValueError):
            is_loopback = is_loopback or ipaddress.ip_address(self.host).is_loopback
        if not (is_loopback or self.api_key or self.api_key_file):
            raise ValueError(
                f"--host {self.host} can be reached by others; give --api_key_file FILE (or --api_key KEY), or listen "
                "on 127.0.0.1"
            )
