"""OpenAI's `/v1/completions` and `/v1/models`, with the tokenizer routes that lm-eval looks for.

https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

from fastapi import FastAPI
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from megatron_infer.completion import Completion, TokenLogprob
from megatron_infer.fim import FimPrompt
from megatron_infer.llm import LLM
from megatron_infer.serve.body import Body, Fields, Stop, read_json, stop_strings
from megatron_infer.serve.dialects import tabby
from megatron_infer.serve.errors import Refusal
from megatron_infer.serve.reply import Reply, Wire, finish_reason, report, usage
from megatron_infer.serve.service import Ask, Call, Part, Service, Update

_USUAL_MAX_TOKENS = 16
"""As OpenAI documents it."""


class StreamOptions(Fields):
    include_usage: bool = False


class CompletionBody(Body):
    """The fields of OpenAI, and those of vLLM that its clients send."""

    UNSUPPORTED: ClassVar = {
        "best_of": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,),
        "logit_bias": ({},), "min_tokens": (0,), "prompt_logprobs": (), "include_stop_str_in_output": (False,),
        "truncate_prompt_tokens": (), "guided_json": (), "guided_regex": (), "guided_choice": (),
        "guided_grammar": (), "response_format": ({"type": "text"},), "structured_outputs": (), "use_beam_search": (False,),
        "deadline_ms": (), "messages": (),
    }  # fmt: skip

    prompt: str | list[str] | list[int] | list[list[int]] = ""
    suffix: str = ""
    max_tokens: Annotated[int, Field(ge=0)] = _USUAL_MAX_TOKENS
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int = 1
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stop: Stop | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: int | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """Each prompt, as text or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise ValueError("prompt is an empty list")
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


def to_ask(service: Service, body: CompletionBody) -> Ask:
    """Raises ValueError."""
    if body.suffix and body.echo:
        raise ValueError("echo and suffix do not go together")
    sampling = body.sampling(
        service, usual_ending="raw", max_new_tokens=body.max_tokens, temperature=body.temperature, top_p=body.top_p,
        top_k=body.top_k, min_p=body.min_p, n=body.n, logprobs=body.logprobs, stop=stop_strings(body.stop),
        stop_token_ids=body.stop_token_ids, ignore_eos=body.ignore_eos, seed=body.seed,
    )  # fmt: skip
    is_marked = service.settings.parse_special if body.parse_special is None else body.parse_special
    parts = []
    for prompt in body.prompts():
        if isinstance(prompt, str):
            if is_marked and body.suffix:
                raise ValueError("parse_special is for prompts that have a layout of their own, without suffix")
            if not is_marked:
                fim = FimPrompt(prompt, body.suffix, body.path, repository=body.repository, language=body.language)
                parts.append(Part(fim, sampling, body.layout))
                continue
        elif body.suffix:
            raise ValueError("with suffix, prompt must be text")
        parts.append(Part(prompt, sampling))
    return Ask("openai", tuple(parts), session_id=body.session_id)


class CompletionWire(Wire):
    last = ("[DONE]",)

    def __init__(self, service: Service, body: CompletionBody) -> None:
        super().__init__(service)
        self._body = body
        self._echoes = _echoes(service.llm, body)
        self._begun: set[int] = set()

    def whole(self, call: Call, done: list[Completion]) -> Any:
        choices = [
            self._choice(index, self._echo(index) + completion.text, completion)
            for index, completion in enumerate(done)
        ]
        return {**self._head(choices), "usage": usage(done), "megatron_infer": report(call, done)}

    def events(self, call: Call, update: Update) -> Iterable[Any]:
        """Log probabilities come with a choice's last event: a stop string may take back the tokens before."""
        text = update.text
        if update.index not in self._begun:
            self._begun.add(update.index)
            text = self._echo(update.index) + text
        yield self._head([self._choice(update.index, text, update.completion)])

    def end(self, call: Call, done: list[Completion]) -> Iterable[Any]:
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            yield {**self._head([]), "usage": usage(done), "megatron_infer": report(call, done)}

    def _echo(self, index: int) -> str:
        return self._echoes[index // self._body.n] if self._echoes else ""

    def _head(self, choices: list[Any]) -> dict[str, Any]:
        return {
            "id": self.id, "object": "text_completion", "created": self.created, "model": self.service.model_name,
            "choices": choices,
        }  # fmt: skip

    def _choice(self, index: int, text: str, completion: Completion | None) -> dict[str, Any]:
        logprobs = None
        if completion is not None and completion.logprobs is not None:
            logprobs = logprobs_object(self.service.llm, completion)
        reason = None if completion is None else finish_reason(completion)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _echoes(llm: LLM, body: CompletionBody) -> list[str]:
    if not body.echo:
        return []
    return [prompt if isinstance(prompt, str) else llm.tokenizer.decode(prompt) for prompt in body.prompts()]


def token_text(llm: LLM, token_id: int) -> str:
    """A token's text; `bytes:\\x..` where it is a part of a character."""
    raw = llm.tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def logprobs_object(llm: LLM, completion: Completion) -> dict[str, Any]:
    """One row per token; of those whose text is in the answer, and an end token."""
    tokens, values, tops, offsets, offset = [], [], [], [], 0
    is_cut = len(completion.text) < len(llm.tokenizer.decode(completion.token_ids))
    for row in completion.logprobs or ():
        if is_cut and offset >= len(completion.text):
            break
        text = token_text(llm, row.token_id)
        tokens.append(text)
        values.append(row.logprob)
        tops.append(top_object(llm, row))
        offsets.append(offset)
        offset += len(llm.tokenizer.decode([row.token_id]))
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def top_object(llm: LLM, row: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens and the one that was drawn; of equal texts the likeliest, so that the maximum is true."""
    top: dict[str, float] = {}
    for token_id, logprob in sorted((*row.top, (row.token_id, row.logprob)), key=lambda pair: -pair[1]):
        top.setdefault(token_text(llm, token_id), logprob)
    return top


def add_routes(app: FastAPI, service: Service) -> None:
    """All routes of the dialect."""

    async def completions(request: Request) -> Response:
        raw = await read_json(request)
        if isinstance(raw, dict) and "segments" in raw:
            return tabby.completions(request, service, raw)
        body = CompletionBody.model_validate(raw)
        return Reply(service, to_ask(service, body), CompletionWire(service, body), stream=body.stream)

    async def models() -> Any:
        return {"object": "list", "data": [_model(service)]}

    async def model(name: str) -> Any:
        return _model(service)

    async def chat() -> Any:
        raise Refusal(
            400, "chat is not served; code is completed by /v1/completions or /v1/fim/completions with suffix"
        )

    for path in ("/v1/completions", "/beta/completions", "/v1/beta/completions"):
        app.post(path)(completions)
    app.get("/v1/models")(models)
    app.get("/v1/models/{name:path}")(model)
    for path in ("/v1/chat/completions", "/beta/chat/completions", "/chat/completions", "/api/chat"):
        app.post(path)(chat)


def _model(service: Service) -> dict[str, Any]:
    llm = service.llm
    fim = {
        "supported": bool(llm.fim.orders), "family": llm.fim.name, "orders": llm.fim.orders,
        "repo_level": llm.fim.takes_extra_files,
    }  # fmt: skip
    return {
        "id": service.model_name, "object": "model", "created": service.created, "owned_by": "megatron_infer",
        "max_model_len": llm.max_model_len, "meta": {"fim": fim},
    }  # fmt: skip
