"""llama.cpp's server (https://github.com/ggml-org/llama.cpp/tree/master/tools/server): `/infill` for its editors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from fastapi import FastAPI, Request, Response
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from megatron_infer.completion import Completion, TokenLogprob
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.serve.dialects.base import Body, Fields, Reply, Wire, report, takes
from megatron_infer.serve.errors import Refusal
from megatron_infer.serve.service import Call, Part, Service, Update

_OTHERS_TEMPERATURE = 0.8
"""Of further completions (n_cmpl) where none is given and the first is greedy; llama.cpp's own default."""


class Extra(Fields):  # and `time`, which is two numbers from llama.vim and one from llama.vscode
    text: str
    filename: str = ""


class AnyBody(Body):
    """t_max_prompt_ms: how long it may wait for its turn. t_max_predict_ms: from the first token on, once a line is
    there. Both 0: no limit. n_predict: below 0 the server's default; 0 only computes the prompt."""

    refuses: ClassVar = "llama.cpp"

    n_predict: int = -1
    n_cmpl: Annotated[int, Field(ge=1)] = 1
    t_max_prompt_ms: float = 0
    t_max_predict_ms: float = 0
    n_probs: Annotated[int, Field(ge=0, le=20)] = 0
    response_fields: list[str] | None = None
    return_tokens: bool = False
    return_raw_text: bool = False

    def samplings(self, service: Service, ending: str) -> list[SamplingParams]:
        """One for all completions; or the first greedy, as llama.vscode shows it, and others to choose from."""
        sampling = self.sampling(
            service, ending, logprobs=self.n_probs or None, n=self.n_cmpl,
            max_new_tokens=self.n_predict if self.n_predict >= 0 else None,
            top_k=None if self.top_k is None else max(0, self.top_k),
        )  # fmt: skip
        if self.n_cmpl == 1 or sampling.temperature > 0 or self.temperature is not None:
            return [sampling]
        return [replace(sampling, n=1), replace(sampling, n=self.n_cmpl - 1, temperature=_OTHERS_TEMPERATURE)]

    def within_limits(self, service: Service, parts: Iterable[Part]) -> Reply:
        limits = {"patience_seconds": self.t_max_prompt_ms, "predict_seconds": self.t_max_predict_ms}
        given = {name: ms / 1000 for name, ms in limits.items() if ms > 0}
        return self.reply(AnswerWire(service, self), parts, **given)


class InfillBody(AnyBody):
    """`prompt` is the line of the cursor, up to it. n_indent tells what the ending rules see in the prefix."""

    input_prefix: str
    input_suffix: str
    input_extra: list[Extra] = Field([])
    prompt: str = ""


class PromptBody(AnyBody):
    prompt: str | list[int]


class TokenizeBody(Fields):  # with vLLM's names beside llama.cpp's
    content: str = ""
    prompt: str = ""
    parse_special: bool = False
    add_special: bool = False
    add_special_tokens: bool = False


class DetokenizeBody(Fields):
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


class AnswerWire(Wire):
    dialect = "llama.cpp"

    def __init__(self, service: Service, body: AnyBody) -> None:
        super().__init__(service)
        self._body = body

    def whole(self, call: Call, done: Sequence[Completion]) -> Any:
        answers = [self._end(call, index, completion, completion.text) for index, completion in enumerate(done)]
        return answers if self._body.n_cmpl > 1 else answers[0]

    def events(self, call: Call, update: Update) -> Iterable[Any]:
        if update.completion is not None:
            yield self._end(call, update.index, update.completion, update.text)
        else:
            yield {"index": update.index, "content": update.text, "tokens": [], "stop": False}

    def _end(self, call: Call, index: int, completion: Completion, text: str) -> dict[str, Any]:
        body, timings = self._body, completion.timings
        word = call.growing[index].stopped_by
        by_text = word is not None or completion.trimmed_by is not None  # a rule that ended it counts as a word
        stop_type = "word" if by_text else "eos" if completion.finish_reason == "stop" else "limit"
        num_new = timings.num_new_tokens
        answer = {
            "index": index, "content": text, "stop": True, "stop_type": stop_type,
            "stopping_word": word or "", "model": self.service.model_name,
            "tokens": list(completion.token_ids) if body.return_tokens else [],
            "tokens_predicted": num_new, "tokens_evaluated": timings.num_prompt_tokens,
            "tokens_cached": timings.num_prompt_tokens + num_new, "truncated": completion.num_dropped_tokens > 0,
            "timings": _timings(completion), "megatron_infer": report(call, [completion]),
        }  # fmt: skip
        if body.n_probs:
            answer["completion_probabilities"] = [self._row(row) for row in completion.logprobs or ()]
        if body.return_raw_text:
            answer["raw_text"] = completion.text if completion.raw_text is None else completion.raw_text
        return answer if body.response_fields is None else project(answer, body.response_fields)

    def _row(self, row: TokenLogprob) -> dict[str, Any]:
        return {**self._token(row.token_id, row.logprob), "top_logprobs": [self._token(*pair) for pair in row.top]}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self.service.llm.tokenizer.token_bytes(token_id)
        return {"id": token_id, "token": raw.decode("utf-8", "replace"), "bytes": list(raw), "logprob": logprob}


def _timings(completion: Completion) -> dict[str, float]:
    timings, num_cached = completion.timings, completion.num_cached_tokens
    first, total = timings.first_token_seconds, timings.total_seconds
    found: dict[str, float] = {"cache_n": num_cached, "draft_n": completion.num_draft_tokens}
    found["draft_n_accepted"] = completion.num_draft_accepted
    prompt = ("prompt", timings.num_prompt_tokens - num_cached, first)
    for name, count, seconds in (prompt, ("predicted", timings.num_new_tokens, max(0.0, total - first))):
        found |= {f"{name}_n": count, f"{name}_ms": round(1000 * seconds, 3)}
        found[f"{name}_per_token_ms"] = round(1000 * seconds / count, 3) if count else 0.0
        found[f"{name}_per_second"] = round(count / seconds, 3) if seconds else 0.0
    return found


def project(answer: dict[str, Any], fields: list[str]) -> dict[str, Any]:
    """Those fields alone; "a/b" is b of a, and stays the name, as in llama.cpp. Unknown ones are left out."""
    objects = {name: value for name, value in answer.items() if isinstance(value, dict)}
    flat = answer | {f"{name}/{key}": value for name in objects for key, value in objects[name].items()}
    return {field: flat[field] for field in fields if field in flat}


def add_routes(app: FastAPI, service: Service) -> None:
    llm = service.llm

    @app.post("/infill", openapi_extra=takes(InfillBody, streams="text/event-stream"))
    async def infill(request: Request) -> Response:
        body = await InfillBody.read(request)
        if not llm.fim.orders:
            raise Refusal(501, f"the model's FIM family {llm.fim.name!r} has no format for code before and after")
        extra = ((item.filename, item.text) for item in body.input_extra)
        prompt = body.hole(body.input_prefix + body.prompt, body.input_suffix, more=extra)
        parts = [body.part(prompt, sampling, service.for_typing) for sampling in body.samplings(service, "auto")]
        return body.within_limits(service, parts)

    @app.post("/completion", openapi_extra=takes(PromptBody, streams="text/event-stream"))
    async def completion(request: Request) -> Response:
        body = await PromptBody.read(request)
        prompt = body.continued(service, body.prompt) if isinstance(body.prompt, str) else body.prompt
        return body.within_limits(service, [body.part(prompt, s) for s in body.samplings(service, "raw")])

    @app.post("/tokenize", openapi_extra=takes(TokenizeBody))
    async def tokenize(request: Request) -> Any:
        body = await TokenizeBody.read(request)
        ids = await run_in_threadpool(service.tokenize, body.content or body.prompt, is_marked=body.parse_special)
        if (body.add_special or body.add_special_tokens) and llm.tokenizer.adds_bos:
            ids = [llm.tokenizer.bos_id or 0, *ids]
        return {"tokens": ids, "count": len(ids), "max_model_len": llm.max_model_len}

    @app.post("/detokenize", openapi_extra=takes(DetokenizeBody))
    async def detokenize(request: Request) -> Any:
        body = await DetokenizeBody.read(request)
        text = await run_in_threadpool(llm.tokenizer.decode, body.tokens)
        return {"content": text, "prompt": text}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Any:
        names = {token_id: piece for piece, token_id in llm.tokenizer.control_pieces.items()}
        ids = {"eos_token": llm.tokenizer.eos_id, "bos_token": llm.tokenizer.bos_id, "pad_token": llm.tokenizer.pad_id}
        return {**{name: names.get(-1 if i is None else i) for name, i in ids.items()}, "chat_template": None}

    @app.get("/props")
    async def props() -> Any:
        settings, name = {"n_ctx": llm.max_model_len}, service.model_name
        about = {"model_path": name, "model_alias": name, "build_info": "megatron_infer", "chat_template": ""}
        return {"default_generation_settings": settings, "total_slots": llm.config.max_num_seqs, **about}

    @app.get("/slots")
    async def slots() -> Any:
        busy, total = service.admission.num_in_hand, llm.config.max_num_seqs
        return [{"id": i, "n_ctx": llm.max_model_len, "is_processing": i < busy} for i in range(total)]
