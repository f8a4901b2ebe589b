"""The command `serve`: loads a model, listens, and ends in order: requests in hand first, then the ranks."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from megatron_infer.commands import options
from megatron_infer.config import EngineConfig
from megatron_infer.llm import LLM
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.serve.app import make_app
from megatron_infer.serve.metrics import JsonLines
from megatron_infer.serve.service import Service
from megatron_infer.serve.settings import Settings
from megatron_infer.text.fim_prompt import FimPrompt
from megatron_infer.world import World

_MAX_HEADER_BYTES = 32 << 10
_KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep an idle connection: whoever closes it while the other speaks breaks a request."""
_CLIENTS = Path(__file__).with_name("clients.txt")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m megatron_infer serve`. Returns the exit status: 1 where the engine has died."""
    return options.run_command(lambda world: _run(_parser(world).parse_args(argv), world))


def _run(args: argparse.Namespace, world: World) -> int:
    settings, defaults = options.build(Settings, args), options.build(SamplingParams, args)
    keys = (*settings.api_key, *_keys_in(settings.api_key_file))
    if world.is_first:
        listening = listen(settings.host, settings.port)
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonLines())
        logging.basicConfig(handlers=[handler], level=logging.INFO)
    model_dir, config = options.model_dir_of(args), options.build(EngineConfig, args)
    with LLM(model_dir, config, model_name=args.model_name, fim=args.fim, world=world) as llm:
        if not llm.is_leader:
            # The launcher passes a signal on to every rank; this one goes when rank 0 has finished.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            llm.follow()
            return 0
        service = Service(llm, settings, defaults, args.ending)
        # Proves that all ranks compute, and sorts the vocabulary for token healing: the first keystroke need not wait.
        llm.complete(FimPrompt("x"), SamplingParams(max_new_tokens=1), service.for_typing)
        Server(service, keys).run_until_told(listening)
        if not service.stop():
            options.say("a step did not come back; the ranks are ended by force")
            os._exit(1)
        return 1 if service.engine.failure is not None else 0


def _keys_in(name: str | None) -> list[str]:
    try:
        keys = Path(name).read_text(encoding="ascii").split() if name else []
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the API keys in {name}: {error}") from None
    if name and not keys:
        raise ValueError(f"there is no API key in {name}")
    return keys


def listen(host: str, port: int) -> socket.socket:
    """A socket, before a model is loaded in vain. Raises ValueError."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # Of a socket with its protocol named, asyncio turns off Nagle's algorithm: answers came 40 ms late.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise ValueError(f"cannot listen on --host {host} --port {port}: {error.strerror}") from None
    return listening


class Server(uvicorn.Server):
    """Uvicorn, but a signal ends this process in order: the first lets requests finish, the second does not."""

    def __init__(self, service: Service, keys: tuple[str, ...]) -> None:
        super().__init__(
            uvicorn.Config(
                make_app(service, keys), log_config=None, access_log=False, http="h11", ws="none", proxy_headers=False,
                server_header=False, h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
                timeout_graceful_shutdown=service.settings.drain_seconds, timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            )
        )  # fmt: skip
        self._service = service
        service.on_failure = self.end

    def run_until_told(self, listening: socket.socket) -> None:
        """Serve until a signal, or until the engine dies; first say where, and what to tell each client."""
        host, port = listening.getsockname()[:2]
        reached = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        clients = _CLIENTS.read_text(encoding="utf-8")
        print(clients.format(base=f"http://{reached}:{port}", model=self._service.model_name), flush=True)
        asyncio.run(self.serve([listening]))

    def end(self) -> None:
        """Take no more requests, let those in hand finish, then end."""
        self._service.admission.is_draining = True
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of both signals; uvicorn would raise it again afterwards, before the ranks are told."""
        if self.should_exit:
            self.force_exit = True
        self.end()


def _parser(world: World) -> options.Parser:
    parser = options.Parser(
        world,
        "python -m megatron_infer serve",
        "Serve code completions to editors: the APIs of OpenAI, Mistral (FIM), llama.cpp, Ollama and Tabby on one "
        "port. Under torchrun all ranks serve together. The options of sampling hold where a request does not say.",
    )
    model = options.add_model_options(parser)
    options.add_option(model, "fim", help="FIM prompt family (default: from config.json or the tokenizer)")
    for kind, title in ((Settings, "server"), (SamplingParams, "sampling"), (EngineConfig, "engine")):
        options.add_options_of(kind, parser, title)
    return parser
