"""llama.cpp's server: `/infill` for llama.vim and llama.vscode, `/completion`, and what its clients ask about.

https://github.com/ggml-org/llama.cpp/tree/master/tools/server
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from fastapi import FastAPI
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from megatron_infer.completion import Completion, TokenLogprob
from megatron_infer.fim import MAX_PROMPT_BYTES, FimPrompt
from megatron_infer.llm import Prompt
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.serve.body import Body, Fields, Stop, read_body, stop_strings
from megatron_infer.serve.context import Snippet
from megatron_infer.serve.errors import Refusal
from megatron_infer.serve.reply import Reply, Wire, report
from megatron_infer.serve.service import Ask, Call, Part, Service, Update

_OTHERS_TEMPERATURE = 0.8
"""Of further completions (n_cmpl) where none is given and the first is greedy; llama.cpp's own default."""


class Extra(Fields):
    """llama.vim's `time` is two numbers, llama.vscode's is one: it is not read."""

    text: str
    filename: str = ""


class _Common(Body):
    """t_max_prompt_ms: how long it may wait for its turn. t_max_predict_ms: from the first token on, once a line is
    there. Both 0: no limit. n_predict: below 0 the server's default; 0 only computes the prompt."""

    UNSUPPORTED: ClassVar = {
        "grammar": ("",), "json_schema": ({}, ""), "lora": ([],), "repeat_penalty": (1,), "presence_penalty": (0,),
        "frequency_penalty": (0,), "dry_multiplier": (0,), "xtc_probability": (0,), "typical_p": (1,), "mirostat": (0,),
        "dynatemp_range": (0,), "logit_bias": ([], {}), "deadline_ms": (),
    }  # fmt: skip

    n_predict: int = -1
    n_cmpl: Annotated[int, Field(ge=1)] = 1
    t_max_prompt_ms: float = 0
    t_max_predict_ms: float = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Stop | None = None
    stream: bool = False
    n_probs: Annotated[int, Field(ge=0, le=20)] = 0
    ignore_eos: bool | None = None
    response_fields: list[str] | None = None
    return_tokens: bool = False
    return_raw_text: bool = False

    def samplings(self, service: Service, usual_ending: str) -> list[SamplingParams]:
        """One for all completions; or the first greedy, as llama.vscode shows it, and others to choose from."""
        sampling = self.sampling(
            service, usual_ending=usual_ending, temperature=self.temperature, top_p=self.top_p, min_p=self.min_p,
            max_new_tokens=max(1, self.n_predict) if self.n_predict >= 0 else None,
            top_k=None if self.top_k is None else max(0, self.top_k), seed=self.seed, stop=stop_strings(self.stop),
            logprobs=self.n_probs or None, ignore_eos=self.ignore_eos, n=self.n_cmpl,
        )  # fmt: skip
        if self.n_cmpl == 1 or sampling.temperature > 0 or self.temperature is not None:
            return [sampling]
        return [replace(sampling, n=1), replace(sampling, n=self.n_cmpl - 1, temperature=_OTHERS_TEMPERATURE)]

    def ask(self, parts: Iterable[Part]) -> Ask:
        return Ask(
            "llama.cpp", tuple(parts), session_id=self.session_id,
            patience_seconds=self.t_max_prompt_ms / 1000 if self.t_max_prompt_ms > 0 else None,
            predict_seconds=self.t_max_predict_ms / 1000 if self.t_max_predict_ms > 0 else None,
        )  # fmt: skip


class InfillBody(_Common):
    """`prompt` is the line of the cursor, up to it. n_indent tells what the ending rules see in the prefix."""

    input_prefix: str
    input_suffix: str
    input_extra: list[Extra] = []
    prompt: str = ""


class CompletionBody(_Common):
    prompt: str | list[int]


class TokenizeBody(Body):
    """llama.cpp's `content`, or `prompt` as vLLM has it."""

    content: str | None = None
    prompt: str | None = None
    add_special: bool = False
    add_special_tokens: bool = False


class DetokenizeBody(Body):
    tokens: list[int]


class InfillWire(Wire):
    def __init__(self, service: Service, body: _Common) -> None:
        super().__init__(service)
        self._body = body

    def whole(self, call: Call, done: list[Completion]) -> Any:
        answers = [self._end(call, index, completion, completion.text) for index, completion in enumerate(done)]
        return answers if self._body.n_cmpl > 1 else answers[0]

    def events(self, call: Call, update: Update) -> Iterable[Any]:
        if update.completion is not None:
            yield self._end(call, update.index, update.completion, update.text)
        else:
            yield {"index": update.index, "content": update.text, "tokens": [], "stop": False}

    def _end(self, call: Call, index: int, completion: Completion, text: str) -> dict[str, Any]:
        body, timings = self._body, completion.timings
        is_warm_up = body.n_predict == 0
        stop_type, word = _stop(completion, call.growing[index].stopped_by)
        num_new = 0 if is_warm_up else timings.num_new_tokens
        answer = {
            "index": index, "content": "" if is_warm_up else text, "stop": True, "stop_type": stop_type,
            "stopping_word": word, "model": self.service.model_name,
            "tokens": list(completion.token_ids) if body.return_tokens else [],
            "tokens_predicted": num_new, "tokens_evaluated": timings.num_prompt_tokens,
            "tokens_cached": timings.num_prompt_tokens + num_new, "truncated": completion.num_dropped_tokens > 0,
            "timings": _timings(completion, num_new), "megatron_infer": report(call, [completion]),
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


def _stop(completion: Completion, stopped_by: str | None) -> tuple[str, str]:
    """Why it ended, in llama.cpp's words: a rule that ended it counts as a word."""
    if stopped_by is not None or completion.trimmed_by is not None:
        return "word", stopped_by or ""
    return ("eos" if completion.finish_reason == "stop" else "limit"), ""


def _timings(completion: Completion, num_new: int) -> dict[str, float]:
    timings = completion.timings
    num_prompt = timings.num_prompt_tokens - completion.num_cached_tokens
    prompt_ms = 1000 * timings.first_token_seconds
    predicted_ms = 1000 * max(0.0, timings.total_seconds - timings.first_token_seconds)
    return {
        "cache_n": completion.num_cached_tokens,
        **_speed("prompt", num_prompt, prompt_ms),
        **_speed("predicted", num_new, predicted_ms),
    }


def _speed(name: str, count: int, ms: float) -> dict[str, float]:
    return {
        f"{name}_n": count,
        f"{name}_ms": round(ms, 3),
        f"{name}_per_token_ms": round(ms / count, 3) if count else 0.0,
        f"{name}_per_second": round(1000 * count / ms, 3) if ms else 0.0,
    }


def project(answer: dict[str, Any], fields: list[str]) -> dict[str, Any]:
    """Those fields alone; "a/b" is a place within, and stays the name, as in llama.cpp. Unknown ones are left out."""
    found = {}
    for field in fields:
        value: Any = answer
        for key in field.split("/"):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found[field] = value
    return found


def add_routes(app: FastAPI, service: Service) -> None:
    """All routes of the dialect but `/health`."""
    llm = service.llm

    @app.post("/infill")
    async def infill(request: Request) -> Response:
        body = await read_body(request, InfillBody)
        if not llm.fim.orders:
            raise Refusal(501, f"the model's FIM family {llm.fim.name!r} has no format for code before and after")
        prompt = FimPrompt(
            body.input_prefix + body.prompt, body.input_suffix, body.path, repository=body.repository,
            language=body.language,
        )  # fmt: skip
        extra = tuple(Snippet(item.filename, item.text) for item in body.input_extra)
        parts = [Part(prompt, sampling, body.layout, extra) for sampling in body.samplings(service, "auto")]
        return Reply(service, body.ask(parts), InfillWire(service, body), stream=body.stream)

    async def completion(request: Request) -> Response:
        body = await read_body(request, CompletionBody)
        is_marked = service.settings.parse_special if body.parse_special is None else body.parse_special
        prompt: Prompt = body.prompt
        if isinstance(prompt, str) and not is_marked:
            prompt = FimPrompt(prompt, path=body.path, language=body.language)
        parts = [Part(prompt, sampling, body.layout) for sampling in body.samplings(service, "raw")]
        return Reply(service, body.ask(parts), InfillWire(service, body), stream=body.stream)

    async def tokenize(request: Request) -> Any:
        body = await read_body(request, TokenizeBody)
        text = body.prompt if body.content is None else body.content
        if text is None or len(text) > MAX_PROMPT_BYTES:
            raise ValueError(f"give content (or prompt), text of at most {MAX_PROMPT_BYTES} bytes")
        encode = llm.tokenizer.encode_marked if body.parse_special else llm.tokenizer.encode
        ids = await run_in_threadpool(encode, text)
        if (body.add_special or body.add_special_tokens) and llm.tokenizer.adds_bos:
            ids = [llm.tokenizer.bos_id or 0, *ids]
        return {"tokens": ids, "count": len(ids), "max_model_len": llm.max_model_len}

    async def detokenize(request: Request) -> Any:
        body = await read_body(request, DetokenizeBody)
        if not all(0 <= token_id < llm.model_config.vocab_size for token_id in body.tokens):
            raise ValueError(f"tokens must be from 0 to {llm.model_config.vocab_size - 1}")
        text = await run_in_threadpool(llm.tokenizer.decode, body.tokens)
        return {"content": text, "prompt": text}

    async def tokenizer_info() -> Any:
        names = {i: piece for piece, i in llm.tokenizer.control_pieces.items()}
        ids = {"eos_token": llm.tokenizer.eos_id, "bos_token": llm.tokenizer.bos_id, "pad_token": llm.tokenizer.pad_id}
        return {**{name: names.get(-1 if i is None else i) for name, i in ids.items()}, "chat_template": None}

    async def props() -> Any:
        settings = {"n_ctx": llm.max_model_len, "n_predict": service.defaults.max_new_tokens}
        return {
            "default_generation_settings": settings, "total_slots": llm.config.max_num_seqs, "chat_template": "",
            "model_path": service.model_name, "model_alias": service.model_name, "build_info": "megatron_infer",
        }  # fmt: skip

    async def slots() -> Any:
        busy = min(service.admission.num_in_hand, llm.config.max_num_seqs)
        return [
            {"id": i, "n_ctx": llm.max_model_len, "is_processing": i < busy} for i in range(llm.config.max_num_seqs)
        ]

    app.post("/completion")(completion)
    app.post("/completions")(completion)
    app.post("/tokenize")(tokenize)
    app.post("/detokenize")(detokenize)
    app.get("/tokenizer_info")(tokenizer_info)
    app.get("/props")(props)
    app.get("/slots")(slots)
