"""Train the bundled demo checkpoint: aiXcoder's architecture in small, on CPython's standard library, on a CPU.

python examples/train_demo.py --minutes 90 --work DIR --out demo    # resumes from DIR when interrupted
python examples/train_demo.py --evaluate demo                      # held-out loss and exact match
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_data import BOS, EOS, MIDDLE, PAD, Samples, SourceFile, read_corpus, train_tokenizer
from safetensors.torch import load_file, save
from torch import Tensor, nn

WEIGHTS = "model-rank0-of-1.safetensors"
BATCH_SHAPES = {(8, 1024): 0.2, (16, 512): 0.35, (32, 256): 0.45}  # (rows, ids per row) -> share
MIDDLE_WEIGHT = 5.0  # of the loss on the text to fill in; 1 on everything else


@dataclass(frozen=True)
class Shape:
    hidden: int = 256
    layers: int = 5
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    ffn: int = 704
    vocab: int = 4096
    positions: int = 4096
    eps: float = 1e-5
    theta: float = 256000.0


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.query_key_value = nn.Linear(s.hidden, (s.heads + 2 * s.kv_heads) * s.head_dim, bias=False)
        self.wo = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: list[Tensor] | None) -> Tensor:
        s, (rows, length) = self.s, x.shape[:2]
        # Per KV group, as Megatron stores it: the group's query heads, then its key head, then its value head.
        qkv = self.query_key_value(x).view(rows, length, s.kv_heads, s.heads // s.kv_heads + 2, s.head_dim)
        q = qkv[..., :-2, :].reshape(rows, length, s.heads, s.head_dim).transpose(1, 2)
        k, v = qkv[..., -2, :].transpose(1, 2), qkv[..., -1, :].transpose(1, 2)
        q, k = rotate(q, rope), rotate(k, rope)
        first = cache is None or not cache
        if cache is not None:
            k, v = (k, v) if first else (torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2))
            cache[:] = [k, v]
        k, v = (t.repeat_interleave(s.heads // s.kv_heads, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=first)
        return self.wo(y.transpose(1, 2).reshape(rows, length, -1))


class FeedForward(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.w1 = nn.Linear(s.hidden, s.ffn, bias=False)
        self.w3 = nn.Linear(s.hidden, s.ffn, bias=False)
        self.w2 = nn.Linear(s.ffn, s.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(s), FeedForward(s)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(s.hidden, s.eps), nn.RMSNorm(s.hidden, s.eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: list[Tensor] | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class Network(nn.Module):
    """The training network; its parameter names are the checkpoint's."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.tok_embeddings = nn.Embedding(s.vocab, s.hidden)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.hidden, s.eps)
        self.output = nn.Linear(s.hidden, s.vocab, bias=False)
        angles = torch.outer(
            torch.arange(s.positions).float(), s.theta ** (-torch.arange(0, s.head_dim, 2).float() / s.head_dim)
        )
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)

    def forward(self, ids: Tensor, caches: list[list[Tensor]] | None = None) -> Tensor:
        """Final hidden states; `caches` holds one list per layer and is filled and extended here."""
        start = caches[0][0].shape[2] if caches and caches[0] else 0
        rope = self.cos[start : start + ids.shape[1]], self.sin[start : start + ids.shape[1]]
        x = self.tok_embeddings(ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, caches[i] if caches is not None else None)
        return self.norm(x)


@torch.no_grad()
def initialise(net: Network) -> None:
    """Start with working copy heads: they need millions of tokens to form by themselves, more than a short run sees.

    Layer 0 looks back 1 to 4 ids (a constant in every embedding's first dimension gives the rotary phases something
    to turn). Layers 1 and 2 look for places whose previous id equals the current one, and copy what stood there.
    """
    s, dim, low = net.s, net.s.head_dim, slice(net.s.head_dim // 4, net.s.head_dim // 2)
    per_group = s.heads // s.kv_heads
    for p in net.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=0.02)
    nn.init.normal_(net.tok_embeddings.weight, std=0.1)
    net.output.weight.copy_(net.tok_embeddings.weight / 3)
    net.output.weight[:, 0] = 0.0
    net.tok_embeddings.weight[:, 0] = 0.7
    frequency = s.theta ** (-torch.arange(0, dim, 2).float() / dim)
    near = torch.arange(dim // 2) < dim // 4  # the fast rotary pairs tell positions apart, the slow ones carry content
    for layer in net.layers:
        nn.init.zeros_(layer.feed_forward.w2.weight)
    basis = nn.init.orthogonal_(torch.empty(s.hidden, s.hidden))
    basis[:, 0] = 0.0
    for group in range(s.kv_heads):
        seen, written = basis[2 * group * dim :][: 2 * dim].split(dim)  # what a head reads; where it writes that
        blocks = [layer.attention.query_key_value.weight.view(s.kv_heads, -1, dim, s.hidden) for layer in net.layers]
        outs = [layer.attention.wo.weight.view(s.hidden, s.kv_heads, per_group, dim) for layer in net.layers]
        for head in range(per_group):
            phase = (head + 1) * frequency
            blocks[0][group, head, :, 0] = 0.86 * torch.cat([phase.cos() * near, -phase.sin() * near])
            out = 0.3 * written if head == 0 else 0.05 * nn.init.orthogonal_(torch.empty(dim, s.hidden))
            outs[0][:, group, head] = out.T
        blocks[0][group, -2, : dim // 2, 0] = 0.86 * near
        blocks[0][group, -1] = seen
        for layer, sharpness in ((1, 3.3), (2, 4.0)):
            copied = basis[(2 * (layer + 1) + group) * dim :][:dim]
            for rows in (low, slice(low.start + dim // 2, low.stop + dim // 2)):
                blocks[layer][group, : per_group // 2, rows] = sharpness * seen[rows]
                blocks[layer][group, -2, rows] = sharpness * written[rows]
            blocks[layer][group, -1] = copied
            outs[layer][:, group, : per_group // 2] = 0.4 * copied.T[:, None]


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * rope[0] + torch.cat([-b, a], -1) * rope[1]


def loss_of(net: nn.Module, output: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Next-token loss averaged with `weights`, one per id; the first id of a row is never predicted."""
    logits = F.linear(net(ids[:, :-1]), output).flatten(0, 1).float()
    losses = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    wanted = weights[:, 1:].flatten()
    return (losses * wanted).sum() / wanted.sum()


def batches(samples: Samples, rng: random.Random, scale: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless padded (ids, loss weights), one sample per row; the length varies so that short contexts are learnt.

    The prefix of an SPM sample has no weight: nothing marks where it ends and the middle begins, so that a model which
    has to predict both learns to run on past the hole. Samples have varying lengths, or their end would tell EOS.
    """
    while True:
        rows, length = rng.choices(list(BATCH_SHAPES), list(BATCH_SHAPES.values()))[0]
        rows = max(1, rows // scale)
        ids, weights = torch.full((rows, length), PAD), torch.zeros(rows, length)
        for row in range(rows):
            context, middle = samples.draw(rng, rng.randint(length * 6 // 10, length))
            end = len(context) + len(middle)
            ids[row, :end] = torch.tensor(context + middle)
            weights[row, :end] = 1.0
            if middle:
                weights[row, context.index(MIDDLE) + 1 : len(context)] = 0.0
                weights[row, len(context) : end] = MIDDLE_WEIGHT
        yield ids, weights


def build_optimizers(net: Network) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, output head and norms."""
    inside = [(name, p) for name, p in net.named_parameters() if name.startswith("layers") and p.ndim == 2]
    matrices = [
        {"params": [p for name, p in inside if "query_key" in name], "lr": 1e-3},  # faster ones saturate the softmax
        {"params": [p for name, p in inside if "query_key" not in name], "lr": 3e-3},
    ]
    norms = [p for p in net.parameters() if p.ndim == 1]
    groups = [
        {"params": [net.tok_embeddings.weight], "lr": 3e-3},
        {"params": [net.output.weight], "lr": 2e-3},
        {"params": norms, "lr": 1e-3, "weight_decay": 0.0},
    ]
    optimizers = [
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def rate(step: int, done: float) -> float:
    """Learning-rate factor after a fraction `done` of the time: warm-up, plateau, linear decay over the last 40 %."""
    return min(1.0, (step + 1) / 60, max(0.0, 1.0 - done) / 0.4)


@torch.no_grad()
def validation_loss(net: Network, samples: Samples, windows: int = 64, length: int = 1024) -> float:
    """Nats per token, plain next-token prediction, on fixed held-out windows."""
    rng, total, count = random.Random(0), 0.0, 0
    for _ in range(windows):
        ids = torch.tensor([samples.plain(samples.draw_file(rng), rng, length)])
        total += loss_of(net, net.output.weight, ids, torch.ones(ids.shape)).item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


@torch.no_grad()
def complete(net: Network, prompt: list[int], max_new: int) -> list[int]:
    """Greedy continuation up to a control id, with a key/value cache."""
    caches: list[list[Tensor]] = [[] for _ in net.layers]
    ids, out = torch.tensor([prompt]), []
    while len(out) < max_new:
        best = int((net.output.weight @ net(ids, caches)[0, -1]).argmax())
        if best in (BOS, EOS) or PAD <= best <= PAD + 7:
            break
        out.append(best)
        ids = torch.tensor([[best]])
    return out


@torch.no_grad()
def exact_match(net: Network, samples: Samples, count: int, show: int) -> dict[str, float]:
    """Greedy SPM completion of `count` held-out single-line holes; equality after stripping both sides."""
    rng, hits, tried = random.Random(1), 0, 0
    while tried < count:
        index = samples.draw_file(rng)
        hole = samples.holes[index].draw(rng, rng.choice(("tail", "line", "statement", "expression", "arguments")))
        if hole is None or "\n" in samples.files[index].text[hole[0] : hole[1]]:
            continue
        drawn = samples.fim(index, hole, rng, 768, spm=True)
        if drawn is None:
            continue
        prompt, middle = drawn
        wanted = samples.files[index].text[hole[0] : hole[1]]
        got = samples.decode(complete(net, prompt, len(middle) + 16))
        hits += got.strip() == wanted.strip()
        tried += 1
        if tried <= show:
            before = "\n".join(samples.files[index].text[: hole[0]].rsplit("\n", 4)[1:])
            print(f"--- {samples.files[index].path}\n{before}\n  wanted: {wanted!r}\n  got:    {got!r}")
    low, high = wilson(hits, tried)
    return {"n": tried, "exact_match": hits / tried, "low": low, "high": high}


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    p, d = hits / n, 1 + z * z / n
    centre, half = (p + z * z / (2 * n)) / d, z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    return max(0.0, centre - half), min(1.0, centre + half)


def export(weights: dict[str, Tensor], shape: Shape, tokenizer: Path, out: Path) -> None:
    """Write the checkpoint directory: bf16 weights, Hugging Face style config, tokenizer. Each file appears whole."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "fim": "aixcoder",
        "hidden_size": shape.hidden, "intermediate_size": shape.ffn, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "vocab_size": shape.vocab, "max_position_embeddings": shape.positions, "rms_norm_eps": shape.eps,
        "rope_theta": shape.theta, "rope_scaling": None, "tie_word_embeddings": False, "attention_bias": False,
        "mlp_bias": False, "hidden_act": "silu", "bos_token_id": BOS, "eos_token_id": EOS, "torch_dtype": "bfloat16",
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
    (out / (WEIGHTS + ".part")).write_bytes(save(tensors, metadata={"format": "pt"}))
    (out / "config.json.part").write_text(json.dumps(config, indent=2) + "\n")
    (out / "tokenizer.model.part").write_bytes(tokenizer.read_bytes())
    for name in (WEIGHTS, "config.json", "tokenizer.model"):
        os.replace(out / (name + ".part"), out / name)


def load_exported(directory: Path) -> Network:
    config = json.loads((directory / "config.json").read_text())
    shape = Shape(
        hidden=config["hidden_size"], layers=config["num_hidden_layers"], heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"], head_dim=config["head_dim"], ffn=config["intermediate_size"],
        vocab=config["vocab_size"], positions=config["max_position_embeddings"], eps=config["rms_norm_eps"],
        theta=config["rope_theta"],
    )  # fmt: skip
    net = Network(shape)
    net.load_state_dict({name: t.float() for name, t in load_file(directory / WEIGHTS).items()})
    return net.eval()


class Training:
    """State of one run: network, optimizers, elapsed time; saved to and resumed from `work`/state.pt."""

    def __init__(self, shape: Shape, files: list[SourceFile], work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.tokenizer, self.state_file = work / "tokenizer.model", work / "state.pt"
        if not self.tokenizer.exists():
            train_tokenizer(files, shape.vocab, self.tokenizer)
        torch.manual_seed(0)
        self.net, self.samples = Network(shape), Samples([f for f in files if not f.held_out], self.tokenizer)
        self.held_out = Samples([f for f in files if f.held_out], self.tokenizer)
        initialise(self.net)
        self.optimizers = build_optimizers(self.net)
        self.step, self.tokens, self.elapsed = 0, 0, 0.0
        if self.state_file.exists():
            state = torch.load(self.state_file, weights_only=True)
            self.net.load_state_dict(state["net"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.tokens, self.elapsed = state["step"], state["tokens"], state["elapsed"]

    def save(self) -> None:
        state = {"net": self.net.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}
        state |= {"step": self.step, "tokens": self.tokens, "elapsed": self.elapsed}
        torch.save(state, part := self.state_file.with_suffix(".part"))
        os.replace(part, self.state_file)

    def run(self, minutes: float, scale: int, compiled: bool, save_every: float = 240.0) -> None:
        """Train until `minutes` of training time have passed, counting the time before a resume."""
        loss_function = torch.compile(loss_of, dynamic=False) if compiled else loss_of
        saved, validated, clock, losses = time.monotonic(), 0.0, time.monotonic(), []
        for ids, weights in batches(self.samples, random.Random(1000 + self.step), scale):
            now = time.monotonic()
            self.elapsed, clock = self.elapsed + now - clock, now
            done = self.elapsed / (60 * minutes)
            if done >= 1:
                break
            losses.append(self.update(loss_function, ids, weights, rate(self.step, done)))
            if self.step % 20 == 0:
                speed = f"{self.tokens} tokens, {self.tokens / self.elapsed if self.elapsed else 0:.0f}/s"
                print(f"step {self.step} {done:6.1%} loss {sum(losses) / len(losses):.3f} {speed}", flush=True)
                losses.clear()
            if now - validated > 2 * save_every or self.step == 20:
                loss = validation_loss(self.net, self.held_out, windows=24)
                print(f"step {self.step} validation loss {loss:.4f}", flush=True)
                validated = now
            if now - saved > save_every:
                self.save()
                saved = now
        self.save()

    def update(self, loss_function: Callable[..., Tensor], ids: Tensor, weights: Tensor, factor: float) -> float:
        loss = loss_function(self.net, self.net.output.weight, ids, weights)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group["peak"]
            optimizer.step()
            optimizer.zero_grad()
        self.step, self.tokens = self.step + 1, self.tokens + int((ids != PAD).sum())
        return loss.item()


def evaluate(directory: Path, count: int, show: int) -> None:
    """Print held-out figures of an exported checkpoint as one JSON line; the held-out files are found again by hash."""
    held_out = [file for file in read_corpus() if file.held_out]
    net, samples = load_exported(directory), Samples(held_out, directory / "tokenizer.model")
    result = {"validation_loss": validation_loss(net, samples), "files": len(held_out)}
    print(json.dumps(result | exact_match(net, samples, count, show)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=90.0, help="training time, resumed time included")
    parser.add_argument("--work", type=Path, help="directory of the tokenizer and of the state to resume from")
    parser.add_argument("--out", type=Path, help="checkpoint directory to write at the end")
    parser.add_argument("--export-only", action="store_true", help="export the state in --work without training")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="measure an exported checkpoint and exit")
    parser.add_argument("--holes", type=int, default=400, help="held-out holes for exact match")
    parser.add_argument("--show", type=int, default=10, help="completions to print while evaluating")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny model on a few files, to try the recipe in seconds"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.evaluate:
        evaluate(args.evaluate, args.holes, args.show)
    elif args.work and args.out:
        train(args)
    else:
        parser.error("--work and --out are needed for training")


def train(args: argparse.Namespace) -> None:
    shape = Shape(hidden=64, layers=3, head_dim=8, ffn=128, vocab=600) if args.smoke else Shape()
    training = Training(shape, read_corpus(limit=12 if args.smoke else None), args.work)
    print(json.dumps(asdict(shape) | {"parameters": sum(p.numel() for p in training.net.parameters())}), flush=True)
    if not args.export_only:
        training.run(args.minutes, scale=8 if args.smoke else 1, compiled=not args.smoke)
    export(training.net.state_dict(), shape, training.tokenizer, args.out)


if __name__ == "__main__":
    main()
