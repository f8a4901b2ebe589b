"""OpenAI's completions (https://platform.openai.com/docs/api-reference/completions), also on DeepSeek's routes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar

from fastapi import FastAPI, Request, Response
from pydantic import Field

from megatron_infer.completion import Completion, TokenLogprob
from megatron_infer.llm import LLM
from megatron_infer.serve.dialects import tabby
from megatron_infer.serve.dialects.base import Body, Wire, finish_reason, read_json, report, takes, usage
from megatron_infer.serve.errors import Refusal
from megatron_infer.serve.service import Call, Part, Service, Update


class CompletionBody(Body):
    """The fields of OpenAI, with its own `max_tokens`, and some that clients send to vLLM."""

    refuses: ClassVar = "openai"

    prompt: str | list[str] | list[int] | list[list[int]] = ""
    suffix: str = ""
    max_tokens: Annotated[int, Field(ge=0)] = 16
    n: int = 1
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stop_token_ids: list[int] | None = None
    stream_options: dict[str, Any] = Field({})

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or ids."""
        given: list[Any] = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        return [given] if not given or isinstance(given[0], int) else given

    def parts(self, service: Service) -> list[Part]:
        """Raises ValueError."""
        of_prompt = self.logprobs if self.echo else None
        sampling = self.sampling(service, "raw", max_new_tokens=self.max_tokens, prompt_logprobs=of_prompt)
        if self.logprobs is not None and self.token_healing:
            raise ValueError(
                "logprobs begin at the cursor, but with token_healing tokens begin before; see n_probs of /infill"
            )
        if not self.suffix:
            prompts = [self.continued(service, p) if isinstance(p, str) else p for p in self.prompts()]
            return [self.part(prompt, sampling) for prompt in prompts]
        texts = [prompt for prompt in self.prompts() if isinstance(prompt, str)]
        if self.echo or self.parse_special or len(texts) < len(self.prompts()):
            raise ValueError("suffix does not go together with echo, parse_special, or a prompt of token ids")
        return [self.part(self.hole(text, self.suffix), sampling) for text in texts]


class CompletionWire(Wire):
    dialect = "openai"
    last = "data: [DONE]\n\n"

    def __init__(self, service: Service, body: CompletionBody) -> None:
        super().__init__(service)
        self._body = body
        self._begun: set[int] = set()
        decode = service.llm.tokenizer.decode
        prompts = body.prompts() if body.echo else []
        self._echoes = [prompt if isinstance(prompt, str) else decode(prompt) for prompt in prompts]

    def whole(self, call: Call, done: Sequence[Completion]) -> Any:
        choices = [self._choice(index, completion.text, completion) for index, completion in enumerate(done)]
        return {**self._head(choices), "usage": usage(done), "megatron_infer": report(call, done)}

    def events(self, call: Call, update: Update) -> Iterable[Any]:
        yield self._head([self._choice(update.index, update.text, update.completion)])

    def end(self, call: Call, done: Sequence[Completion]) -> Iterable[Any]:
        if self._body.stream_options.get("include_usage"):
            yield {**self._head([]), "usage": usage(done), "megatron_infer": report(call, done)}

    def _head(self, choices: list[Any]) -> dict[str, Any]:
        return {
            "id": self.id, "object": "text_completion", "created": self.created, "model": self.service.model_name,
            "choices": choices,
        }  # fmt: skip

    def _choice(self, index: int, text: str, completion: Completion | None) -> dict[str, Any]:
        """Log probabilities come with a choice's end: until then a stop string may take tokens back."""
        if self._echoes and index not in self._begun:
            self._begun.add(index)
            text = self._echoes[index // self._body.n] + text
        logprobs = reason = None
        if completion is not None:
            reason = finish_reason(completion)
            logprobs = None if completion.logprobs is None else rows(self.service.llm, completion)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def rows(llm: LLM, completion: Completion) -> dict[str, Any]:
    """Log probabilities of the prompt's tokens where it is echoed, and of those whose text is in the answer."""
    decode, prompt = llm.tokenizer.decode, completion.prompt_logprobs or ()
    ids = completion.prompt_token_ids[: len(prompt)] + completion.token_ids
    found = [*prompt, *(completion.logprobs or ())]
    offsets = list(itertools.accumulate((len(decode([token_id])) for token_id in ids), initial=0))[:-1]
    if len(completion.text) < len(decode(completion.token_ids)):
        end = len(decode(completion.prompt_token_ids[: len(prompt)])) + len(completion.text)
        found = found[: max(len(prompt), sum(at < end for at in offsets))]
    return {
        "tokens": [token_text(llm, token_id) for token_id in ids[: len(found)]],
        "token_logprobs": [row and row.logprob for row in found],
        "top_logprobs": [row and top(llm, row) for row in found],
        "text_offset": offsets[: len(found)],
    }


def top(llm: LLM, row: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens and the one that was drawn; of equal texts the likeliest, so that the maximum is true."""
    found: dict[str, float] = {}
    for token_id, logprob in sorted((*row.top, (row.token_id, row.logprob)), key=lambda pair: -pair[1]):
        found.setdefault(token_text(llm, token_id), logprob)
    return found


def token_text(llm: LLM, token_id: int) -> str:
    r"""A token's text; of half a character the bytes, as \xNN."""
    return llm.tokenizer.token_bytes(token_id).decode("utf-8", "backslashreplace")


def add_routes(app: FastAPI, service: Service) -> None:
    described = takes(CompletionBody, tabby.SegmentsBody, streams="text/event-stream")

    @app.post("/v1/completions", openapi_extra=described)
    @app.post("/beta/completions", openapi_extra=described)
    @app.post("/v1/beta/completions", openapi_extra=described)
    async def completions(request: Request) -> Response:
        raw = await read_json(request)
        if isinstance(raw, dict) and raw.get("segments") is not None:
            return tabby.completions(request, service, raw)
        body = CompletionBody.model_validate(raw)
        return body.reply(CompletionWire(service, body), body.parts(service))

    @app.post("/v1/chat/completions")
    @app.post("/beta/chat/completions")
    @app.post("/api/chat")
    async def chat() -> Any:
        raise Refusal(400, "chat is not served; for code use /v1/completions or /v1/fim/completions, with suffix")

    @app.get("/v1/models")
    async def models() -> Any:
        fim, limit = service.llm.fim, service.llm.max_model_len
        about = {"family": fim.name, "orders": fim.orders, "repo_level": fim.takes_extra_files}
        model = {
            "id": service.model_name, "object": "model", "created": service.created, "owned_by": "megatron_infer",
            "max_model_len": limit, "meta": {"fim": {"supported": bool(fim.orders), **about}},
        }  # fmt: skip
        return {"object": "list", "data": [model]}
