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

from megatron_infer.config import EngineConfig
from megatron_infer.llm import LLM
from megatron_infer.options import (
    Parser,
    add_model_options,
    add_option,
    add_options_of,
    build,
    model_dir_of,
    run_command,
    say,
)
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.serve.app import make_app
from megatron_infer.serve.metrics import JsonLines
from megatron_infer.serve.service import Service
from megatron_infer.serve.settings import Settings
from megatron_infer.world import World

_MAX_HEADER_BYTES = 32 << 10


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m megatron_infer serve`. Returns the exit status: 1 where the engine has died."""
    return run_command(lambda world: _run(_parser(world).parse_args(argv), world))


def _run(args: argparse.Namespace, world: World) -> int:
    settings, defaults = build(Settings, args), build(SamplingParams, args)
    keys = (*settings.api_key, *_keys_in(settings.api_key_file))
    if world.is_first:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonLines())
        logging.basicConfig(handlers=[handler], level=logging.INFO)
    with LLM(
        model_dir_of(args), build(EngineConfig, args), model_name=args.model_name, fim=args.fim, world=world
    ) as llm:
        if not llm.is_leader:
            # The launcher passes a signal on to every rank; this one goes when rank 0 has finished.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            llm.follow()
            return 0
        service = Service(llm, settings, defaults, args.ending)
        server = Server(service, keys)
        asyncio.run(server.run_until_told())
        if not service.stop():
            say("a step did not come back; the ranks are ended by force")
            os._exit(1)
        return 1 if service.engine.failure is not None else 0


def _keys_in(name: str | None) -> list[str]:
    if name is None:
        return []
    try:
        keys = Path(name).read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the API keys in {name}: {error}") from None
    if not keys:
        raise ValueError(f"there is no API key in {name}")
    return keys


class Server(uvicorn.Server):
    """Uvicorn, but a signal ends this process in order: the first lets requests finish, the second does not."""

    def __init__(self, service: Service, keys: tuple[str, ...]) -> None:
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                make_app(service, keys), host=settings.host, port=settings.port, log_config=None, access_log=False,
                http="h11", ws="none", h11_max_incomplete_event_size=_MAX_HEADER_BYTES, proxy_headers=False,
                server_header=False, timeout_graceful_shutdown=settings.drain_seconds,
            )
        )  # fmt: skip
        self._service = service
        service.on_failure = self.end

    async def run_until_told(self) -> None:
        """Listen until a signal, or until the engine dies."""
        listening = self.config.bind_socket()
        announce(self._service, listening)
        await self.serve([listening])

    def end(self) -> None:
        """Take no more requests, let those in hand finish, then end."""
        self._service.admission.is_draining = True
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of both signals; uvicorn would raise it again afterwards, before the ranks are told."""
        if self.should_exit:
            self.force_exit = True
        self.end()


def announce(service: Service, listening: socket.socket) -> None:
    """Where it listens, and what to tell each client."""
    host, port = listening.getsockname()[:2]
    base = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else f'[{host}]' if ':' in host else host}:{port}"
    name = service.model_name
    say(f"\n{name} at {base}\n")
    for client, first, second in (
        ("llama.vim", f"let g:llama_config = {{'endpoint_fim': '{base}/infill'}}", "  (before the plugin is loaded)"),
        ("llama.vscode", f'"llama-vscode.endpoint": "{base}"', "  (settings.json)"),
        ("Continue", f"provider: mistral, model: {name}", f"apiBase: {base}/v1/"),
        ("Tabby plugins", f'endpoint = "{base}"', "  ([server] in ~/.tabby-client/agent/config.toml)"),
        ("minuet-ai.nvim", "provider = 'openai_fim_compatible'", f"end_point = '{base}/v1/completions'"),
        ("OpenAI clients", f'base_url="{base}/v1"', "completions.create(model=..., prompt=..., suffix=...)"),
        ("Ollama clients", f"OLLAMA_HOST={base}", f"ollama.generate(model='{name}', prompt=..., suffix=...)"),
    ):
        say(f"  {client:<16}{first}\n  {'':<16}{second}")
    say("")


def _parser(world: World) -> Parser:
    parser = Parser(
        world,
        "python -m megatron_infer serve",
        "Serve code completions to editors: the APIs of OpenAI, Mistral (FIM), llama.cpp, Ollama and Tabby on one "
        "port. Under torchrun all ranks serve together. The options of sampling hold where a request does not say.",
    )
    add_option(add_model_options(parser), "fim", help="FIM prompt family (default: from config.json or the tokenizer)")
    add_options_of(Settings, parser, "server")
    add_options_of(SamplingParams, parser, "sampling")
    add_options_of(EngineConfig, parser, "engine")
    return parser
