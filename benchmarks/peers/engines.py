"""The engines behind one interface: load, generate greedily, tell log probabilities. Runs inside a worker process.

Each class imports its packages when constructed, so that a worker holds no other engine's code in memory.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol

from peers.model_files import ModelFiles
from peers.plan import Engine

Prompts = Sequence[Sequence[int]]
Logprobs = dict[int, float]

TOP = 20
"""How many of the most likely tokens engines are compared on."""

CONTEXT_TOKENS = 2304
"""Longest prompt + completion of a single sequence, for engines that reserve memory."""

_LLAMA_WARNINGS = (3, 4)  # ggml.h: GGML_LOG_LEVEL_WARN, GGML_LOG_LEVEL_ERROR

_BATCH_CONTEXT_TOKENS = 32 * 128


class Runner(Protocol):
    """What a worker asks of an engine. All prompts of a call are of one length."""

    def load(self) -> None:
        """Read the weights, ready to answer."""
        ...

    def generate(self, prompts: Prompts, new_tokens: int) -> list[list[int]]:
        """Greedy continuations of exactly `new_tokens` ids, end tokens ignored."""
        ...

    def tune(self, prompts: Prompts, new_tokens: int) -> str:
        """Warm up for such calls; an engine with settings tries them and keeps the fastest. Returns what it kept."""
        ...

    def top_logprobs(self, prompt: Sequence[int]) -> Logprobs:
        """Log probabilities of the TOP most likely next tokens."""
        ...

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of KV cache that hold `tokens` of one sequence, at the granularity this engine reserves or fills it."""
        ...

    def facts(self) -> dict[str, str]:
        """Versions and kernels, for the report."""
        ...


def make_runner(engine: Engine, files: ModelFiles, threads: int, isa: str) -> Runner:
    """The runner of an engine; imports its packages."""
    if engine.project == "megatron_infer":
        return MegatronInfer(engine, files, threads, isa)
    if engine.project == "transformers":
        return Transformers(engine, files, threads)
    return LlamaCpp(engine, files, threads)


def _kv_token_bytes(files: ModelFiles, itemsize: int) -> int:
    config = files.config
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize


class MegatronInfer:
    """This engine through its public `LLM`."""

    def __init__(self, engine: Engine, files: ModelFiles, threads: int, isa: str) -> None:
        import megatron_infer

        self._package, self._files, self._engine = megatron_infer, files, engine
        self._options: dict[str, Any] = {
            "tensor_parallel_size": engine.ranks,
            "num_threads": max(1, threads // engine.ranks),
            "kv_cache_memory_bytes": _BATCH_CONTEXT_TOKENS * _kv_token_bytes(files, 2) // engine.ranks,
        }
        if engine.storage != "none":
            self._options["quantization"] = engine.storage
        if isa != "auto":
            self._options["cpu_isa"] = isa
        self._chosen: list[str] = []

    def load(self) -> None:
        logger, listener = logging.getLogger("megatron_infer"), _Listener(self._chosen)
        logger.addHandler(listener)
        logger.setLevel(logging.INFO)
        config = self._package.EngineConfig(device="cpu", max_model_len=CONTEXT_TOKENS, **self._options)
        self._llm = self._package.LLM(self._files.checkpoint, config)
        logger.removeHandler(listener)

    def generate(self, prompts: Prompts, new_tokens: int) -> list[list[int]]:
        sampling = self._package.SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        if len(prompts) == 1:
            return [list(self._llm.complete(prompts[0], sampling).token_ids)]
        return [list(done.token_ids) for done in self._llm.complete_batch(prompts, sampling)]

    def tune(self, prompts: Prompts, new_tokens: int) -> str:
        self.generate(prompts, new_tokens)
        return ""

    def top_logprobs(self, prompt: Sequence[int]) -> Logprobs:
        sampling = self._package.SamplingParams(max_new_tokens=1, logprobs=TOP, ignore_eos=True)
        logprobs = self._llm.complete(prompt, sampling).logprobs
        assert logprobs is not None
        return dict(logprobs[0].top)

    def kv_bytes(self, tokens: int) -> int:
        # Blocks take memory when they are first written.
        return tokens * _kv_token_bytes(self._files, 2)

    def facts(self) -> dict[str, str]:
        return {"ops": "; ".join(self._chosen)}


class _Listener(logging.Handler):
    """Keeps the engine's own lines about which kernels it chose."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("ops: "):
            # "choice: names of the ops"
            self._lines.append(message.removeprefix("ops: ").rpartition(": ")[0])


class Transformers:
    """Hugging Face's LlamaForCausalLM, eager, in a loop of its own: `generate()` would add its cost per token."""

    def __init__(self, engine: Engine, files: ModelFiles, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self._torch, self._package, self._files = torch, transformers, files
        self._dtype = getattr(torch, engine.storage)

    def load(self) -> None:
        self._model = self._package.LlamaForCausalLM.from_pretrained(
            self._files.hf, dtype=self._dtype, attn_implementation="sdpa"
        ).eval()

    def generate(self, prompts: Prompts, new_tokens: int) -> list[list[int]]:
        torch = self._torch
        with torch.inference_mode():
            cache = self._package.DynamicCache(config=self._model.config)
            ids = torch.tensor(prompts)
            out = []
            for _ in range(new_tokens):
                ids = self._logits(ids, cache).argmax(-1, keepdim=True)
                out.append(ids)
            return torch.cat(out, 1).tolist()

    def _logits(self, ids: Any, cache: Any) -> Any:
        step = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return step.logits[:, -1]

    def tune(self, prompts: Prompts, new_tokens: int) -> str:
        self.generate(prompts, new_tokens)
        return ""

    def top_logprobs(self, prompt: Sequence[int]) -> Logprobs:
        torch = self._torch
        with torch.inference_mode():
            cache = self._package.DynamicCache(config=self._model.config)
            logits = self._logits(torch.tensor([prompt]), cache)[0].float()
            values, indices = logits.log_softmax(-1).topk(TOP)
        return dict(zip(indices.tolist(), values.tolist(), strict=True))

    def kv_bytes(self, tokens: int) -> int:
        return tokens * _kv_token_bytes(self._files, self._dtype.itemsize)

    def facts(self) -> dict[str, str]:
        torch = self._torch
        return {
            "transformers": self._package.__version__,
            "torch": torch.__version__,
            "torch cpu capability": torch.backends.cpu.get_cpu_capability(),
        }


class LlamaCpp:
    """llama.cpp through llama-cpp-python's low-level functions.

    One context per kind of call, kept warm; `tune` chooses flash attention and, for batches, one KV cache for all
    sequences or one for each. Token ids come from numpy's argmax, which is faster than llama.cpp's own samplers.
    """

    def __init__(self, engine: Engine, files: ModelFiles, threads: int) -> None:
        import llama_cpp
        import numpy

        self._lib, self._numpy = llama_cpp, numpy
        self._path, self._files, self._threads = files.gguf(engine.storage), files, threads
        self._contexts: dict[tuple[int, int], _LlamaContext] = {}
        self._untuned: _LlamaContext | None = None

    def load(self) -> None:
        lib = self._lib
        # Its information fills megabytes; what is left are warnings and errors.
        self._log = lib.llama_log_callback(lambda level, text, _: _warn(text) if level in _LLAMA_WARNINGS else None)
        lib.llama_log_set(self._log, None)
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = lib.llama_model_load_from_file(str(self._path).encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {self._path.name}")

    def generate(self, prompts: Prompts, new_tokens: int) -> list[list[int]]:
        context = self._contexts.get((len(prompts), len(prompts[0])))
        if context is None:
            assert len(prompts) == 1, "batches are tuned for before they are timed"
            # One for all calls before tuning, among them the one whose memory is measured.
            context = self._untuned = self._untuned or self._context(prompts, new_tokens, unified=False, flash=True)
        return context.generate(prompts, new_tokens)

    def _context(self, prompts: Prompts, new_tokens: int, *, unified: bool, flash: bool) -> _LlamaContext:
        batch, prompt_tokens = len(prompts), len(prompts[0])
        room = CONTEXT_TOKENS if batch == 1 else -(-(prompt_tokens + new_tokens) // 256) * 256
        return _LlamaContext(self._lib, self._numpy, self._model, self._threads, batch, room, unified, flash)

    def tune(self, prompts: Prompts, new_tokens: int) -> str:
        if self._untuned is not None:
            self._untuned.close()
            self._untuned = None
        # Where decoding counts, a long prompt would only blur which setting decodes faster.
        tried = prompts if new_tokens == 1 else [prompt[:4] for prompt in prompts]
        best: tuple[float, str, _LlamaContext] | None = None
        for unified in (False, True) if len(prompts) > 1 else (False,):
            for flash in (True, False):
                context = self._context(prompts, new_tokens, unified=unified, flash=flash)
                context.generate(tried, min(new_tokens, 8))
                started = time.perf_counter()
                context.generate(tried, new_tokens)
                seconds = time.perf_counter() - started
                layout = f"{'unified' if unified else 'separate'} KV, " if len(prompts) > 1 else ""
                if best is None or seconds < best[0]:
                    if best is not None:
                        best[2].close()
                    best = (seconds, f"{layout}flash attention {'on' if flash else 'off'}", context)
                else:
                    context.close()
        assert best is not None
        self._contexts[len(prompts), len(prompts[0])] = best[2]
        return best[1]

    def top_logprobs(self, prompt: Sequence[int]) -> Logprobs:
        numpy = self._numpy
        context = self._context([prompt], 1, unified=False, flash=True)
        context.generate([prompt], 1)
        logits = context.logits(len(prompt) - 1).astype(numpy.float64)
        context.close()
        logprobs = logits - logits.max()
        logprobs -= numpy.log(numpy.exp(logprobs).sum())
        top = numpy.argsort(-logprobs)[:TOP]
        return {int(i): float(logprobs[i]) for i in top}

    def kv_bytes(self, tokens: int) -> int:
        # The whole context is reserved and cleared when it is made.
        return CONTEXT_TOKENS * _kv_token_bytes(self._files, 2)

    def facts(self) -> dict[str, str]:
        lib = self._lib
        return {
            "llama-cpp-python": lib.__version__,
            "llama.cpp": lib.llama_version().decode(),
            "llama.cpp system info": lib.llama_print_system_info().decode().strip(" |"),
        }


def _warn(text: bytes) -> None:
    sys.stderr.write(text.decode(errors="replace"))


class _LlamaContext:
    """A llama.cpp context for `batch` sequences of at most `room` tokens, and a batch to fill."""

    def __init__(
        self, lib: Any, numpy: Any, model: Any, threads: int, batch: int, room: int, unified: bool, flash: bool
    ) -> None:
        self._lib, self._numpy, self._room = lib, numpy, room
        self._vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = batch * room, batch
        params.n_batch = capacity = min(2048, batch * room)
        params.n_outputs_max = batch
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = unified
        flash_on, flash_off = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED, lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = flash_on if flash else flash_off
        self._context = lib.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError("llama.cpp cannot create a context")
        self._batch = lib.llama_batch_init(capacity, 0, 1)
        for i in range(capacity):
            self._batch.n_seq_id[i] = 1

    def close(self) -> None:
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)

    def generate(self, prompts: Prompts, new_tokens: int) -> list[list[int]]:
        length = len(prompts[0])
        assert length + new_tokens <= self._room, "the context was made for shorter calls"
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        row = 0
        last_rows = []
        for sequence, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                self._set(row, sequence, position, token, wants_logits=position == length - 1)
                row += 1
            last_rows.append(row - 1)
        tokens = self._decode(row, last_rows)
        out = [[token] for token in tokens]
        for position in range(length, length + new_tokens - 1):
            for sequence, token in enumerate(tokens):
                self._set(sequence, sequence, position, token, wants_logits=True)
            tokens = self._decode(len(tokens), range(len(tokens)))
            for ids, token in zip(out, tokens, strict=True):
                ids.append(token)
        return out

    def logits(self, row: int) -> Any:
        """Of a row of the last batch that asked for them; a view that the next call overwrites."""
        pointer = self._lib.llama_get_logits_ith(self._context, row)
        return self._numpy.ctypeslib.as_array(pointer, shape=(self._vocab_size,))

    def _set(self, row: int, sequence: int, position: int, token: int, *, wants_logits: bool) -> None:
        batch = self._batch
        batch.token[row], batch.pos[row], batch.logits[row] = token, position, wants_logits
        batch.seq_id[row][0] = sequence

    def _decode(self, rows: int, logits_rows: Sequence[int]) -> list[int]:
        self._batch.n_tokens = rows
        if status := self._lib.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode returned {status}")
        return [int(self.logits(row).argmax()) for row in logits_rows]
