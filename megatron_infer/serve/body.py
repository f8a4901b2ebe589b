"""What the bodies of all dialects share: reading them, our own fields, refusing what is not supported.

Unknown fields are ignored, as clients send many; a known one that would change the answer is honoured or refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import from_json
from starlette.requests import Request

from megatron_infer.fim import FimOptions
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.serve.errors import Refusal
from megatron_infer.serve.service import Service

_OFF_THE_LOOP_BYTES = 64 << 10
"""A longer body is parsed in a thread."""

Stop = str | list[str]


class Fields(BaseModel):
    """A JSON object of a request."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, protected_namespaces=())
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields that would change the answer and are not supported -> the values that ask for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _check(cls, given: Any) -> Any:
        """null is as good as absent."""
        if not isinstance(given, dict):
            raise ValueError("must be a JSON object")
        for name, neutral in cls.UNSUPPORTED.items():
            if name in given and given[name] is not None and given[name] not in neutral:
                raise ValueError(f"{name} is not supported")
        return {name: value for name, value in given.items() if value is not None}


class Body(Fields):
    """A request body. Beside the fields of its dialect, each takes these of ours:

    path, language, repository: of the code, for the prompt's header and the rules that end an answer. ending, order:
    as in SamplingParams and FimOptions. session_id: a newer request with it ends this one. parse_special: control
    tokens written out in a prompt without suffix are control tokens.
    """

    model: str = ""
    path: str = ""
    language: str = ""
    repository: str = ""
    ending: Literal["raw", "line", "block", "auto"] | None = None
    order: Literal["psm", "spm"] | None = None
    session_id: str | None = Field(None, max_length=256)
    parse_special: bool | None = None

    @property
    def layout(self) -> FimOptions | None:
        """How the prompt is laid out."""
        return None if self.order is None else FimOptions(order=self.order)

    def sampling(self, service: Service, *, usual_ending: str, **given: Any) -> SamplingParams:
        """The server's defaults with what was given; None in `given` is not given. Raises ValueError."""
        named = {name: value for name, value in given.items() if value is not None}
        if "seed" in named:
            named["seed"] = named["seed"] % 2**63 if named["seed"] != -1 else None
        return replace(service.defaults, ending=self.ending or service.ending or usual_ending, **named)


AnyBody = TypeVar("AnyBody", bound=Body)


async def read_json(request: Request) -> Any:
    """The body as plain values. Raises Refusal."""
    raw = await request.body()
    try:
        if len(raw) > _OFF_THE_LOOP_BYTES:
            return await asyncio.to_thread(from_json, raw, allow_inf_nan=False)
        return from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None


async def read_body(request: Request, kind: type[AnyBody]) -> AnyBody:
    """The body as a `kind`. Raises Refusal or ValidationError."""
    return kind.model_validate(await read_json(request))


def stop_strings(stop: Stop | None) -> tuple[str, ...] | None:
    """Stop strings as SamplingParams takes them."""
    return None if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
