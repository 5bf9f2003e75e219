"""Run folders made up for the tests: the files a run writes, with numbers whose truth is known."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

START = 1_750_000_000.0
"""The first event's time, in seconds since 1970."""


@dataclass(frozen=True)
class MadeUp:
    """What a made-up run is like; the defaults are a finished `tiny` run that gains from its context."""

    name: str = "tiny"
    description: str = ""
    notes: dict[str, str] = field(default_factory=dict)
    reason: str = "SIGTERM"
    document: str = "messages/1905-roosevelt"
    names: Sequence[str] = ("64", "128", "256")
    lengths: Sequence[int] = (64, 128, 256)
    tokens: Sequence[int] = (655_360, 327_680, 245_760)
    batch_tokens: int = 2048
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    mlp: int = 352
    vocab: int = 1024
    tokenizer: str = "bpe:1024"
    sources: dict[str, str] = field(default_factory=lambda: {"messages": "embedded:messages", "code": "embedded:code"})
    parameters: int = 1_073_792
    gain: float = -0.05
    """Fixed-target difference of the last checkpoint, a quarter of the context to the whole."""
    spread: float = 0.02
    """Half the width of its interval."""
    blow_up: float = 0.9
    """Loss added by each doubling past the trained length."""
    bits_per_byte: float = 1.91
    xz: float = 2.09
    until: int | None = None
    """Stop after so many tokens; None trains them all."""
    measured: bool = True
    checkpoints: Sequence[str] = ()
    """Names of the measured checkpoints; none stands for the stages' names."""
    resumed_at: Sequence[tuple[int, int]] = ()
    """Kills: (tokens when killed, tokens of the checkpoint resumed from)."""
    spike_at: int | None = None
    speed: float = 14_000.0
    flops: bool = False
    pieces: int = 20
    """Checkpoints and evaluations in the loop."""
    seed: int = 7
    old_length: int | None = None
    """What the model that the run continues was trained on; None for fresh weights."""
    learnt: float = -0.4
    """Change of the loss past that length by training; within it a tenth."""
    place: str = "models/old"
    samples: Sequence[tuple[str, str]] = (
        ("To the Senate and House of", " Representatives: I have the honour to submit the report of the Secretary."),
        ("def read(", "self, path):\n        return open(path).read()\n"),
    )

    @property
    def steps(self) -> list[int]:
        return [-(-count // self.batch_tokens) for count in self.tokens]

    @property
    def total(self) -> int:
        return sum(self.steps) * self.batch_tokens

    @property
    def contexts(self) -> list[int]:
        return [self.lengths[-1] // 8, self.lengths[-1] // 4, self.lengths[-1] // 2, self.lengths[-1]]


FINISHED = MadeUp()
NO_GAIN = MadeUp(gain=-0.004, spread=0.011, blow_up=0.0, bits_per_byte=2.31)
WORSE = MadeUp(gain=0.03, spread=0.01, blow_up=-0.2)
UNFINISHED = MadeUp(until=700_416, measured=False)
RESUMED = MadeUp(resumed_at=((402_000, 368_640), (1_000_000, 983_040)))
CONTINUED = MadeUp(lengths=(128, 256, 512), old_length=64, checkpoints=("start", "start, new rope", "256"))
ONE_STAGE = MadeUp(names=("64",), lengths=(64,), tokens=(655_360,))
HOSTILE_TEXT = (
    "</pre><script>alert('x')</script>\x00\x1b[31m\u202egnp.exe \ud800 <img src=http://evil.example/x.png> &amp; ]]>"
)
HOSTILE = MadeUp(
    name="long-" * 12 + "name",
    description="</style></title><script>alert('description')</script>\u202e",
    notes={"optimizer.learning_rate": "<script>alert('note')</script>"},
    names=("s" * 60, "a-b_c.d", "256"),
    checkpoints=('"><svg onload=alert(1)>', "'; DROP TABLE stages; --", "Δ" * 60),
    sources={"messages": "javascript:alert(2)", "code": "http://evil.example/<b>"},
    tokenizer='texts/"><img src=x onerror=alert(3)>/tokenizer.json',
    samples=((HOSTILE_TEXT, HOSTILE_TEXT + "\u200b" + "W" * 500), ("\n" * 40, "x" * 20_000), ("", "")),
    document="<img src=x onerror=alert(4)>\u202e" + "d" * 400,
    old_length=128,
    place="<img src=x onerror=alert(5)>\u202e" + "p" * 400,
    reason="</table><script>alert('reason')</script>",
    until=700_416,
)
SEVEN_B = MadeUp(
    name="xgen-7b-8k",
    names=("2k", "4k", "8k"),
    lengths=(2048, 4096, 8192),
    tokens=(800_000_000_000, 400_000_000_000, 300_000_000_000),
    batch_tokens=4_000_000 // 8192 * 8192,
    layers=32,
    hidden=4096,
    heads=32,
    mlp=11008,
    vocab=51200,
    tokenizer="xgen",
    sources={"natural": "stores/natural", "code": "stores/code"},
    parameters=6_895_702_016,
    gain=-0.021,
    spread=0.004,
    bits_per_byte=0.62,
    xz=2.21,
    spike_at=900_000_000_000,
    speed=1_150_000.0,
    flops=True,
    pieces=375,
)

RUNS: dict[str, MadeUp] = {
    "finished": FINISHED,
    "no-gain": NO_GAIN,
    "worse": WORSE,
    "unfinished": UNFINISHED,
    "resumed": RESUMED,
    "one-stage": ONE_STAGE,
    "continued": CONTINUED,
    "hostile": HOSTILE,
    "seven-b": SEVEN_B,
}


def write_run(folder: Path, run: MadeUp = FINISHED) -> Path:
    """Write the run folder and return it."""
    (folder / "evals").mkdir(parents=True)
    (folder / "recipe.toml").write_text(recipe_toml(run), encoding="utf-8")
    positions = taken_positions(run)
    write_metrics(folder / "metrics.jsonl", run, positions)
    write_events(folder / "events.jsonl", run)
    if run.old_length is not None:
        (folder / "start.json").write_text(json.dumps(start_json(run)), encoding="utf-8")
    if run.measured:
        (folder / "evals" / "after_training.json").write_text(json.dumps(measurements(run)), encoding="utf-8")
    return folder


def quoted(text: str) -> str:
    return json.dumps(text)  # JSON's escapes are a subset of TOML's for the texts used here


def recipe_toml(run: MadeUp) -> str:
    mixture = ", ".join(f"{quoted(name)} = {1 / len(run.sources):.6f}" for name in run.sources)
    sources = ", ".join(f"{quoted(name)} = {quoted(where)}" for name, where in run.sources.items())
    stages = "".join(
        f"\n[[stages]]\nname = {quoted(name)}\nlength = {length}\ntokens = {tokens}\nbatch_tokens = "
        f"{run.batch_tokens}\n"
        f"microbatch_tokens = {run.batch_tokens}\nmixture = {{ {mixture} }}\n"
        for name, length, tokens in zip(run.names, run.lengths, run.tokens, strict=True)
    )
    notes = "".join(f"{quoted(path)} = {quoted(text)}\n" for path, text in run.notes.items())
    return f"""name = {quoted(run.name)}
description = {quoted(run.description)}
[model]
layers = {run.layers}
hidden_size = {run.hidden}
heads = {run.heads}
kv_heads = {run.heads}
head_size = {run.hidden // run.heads}
mlp_size = {run.mlp}
vocab_size = {run.vocab}
[tokenizer]
name = {quoted(run.tokenizer)}
[data]
sources = {{ {sources} }}
[optimizer]
learning_rate = 0.005
warmup = {run.total // 100}
[checkpoints]
every = {run.total // 10}
[evaluation]
every = {run.total // run.pieces}
tokens = 100000
contexts = {run.contexts}
target = {max(8, run.lengths[-1] // 16)}
{stages}
[notes]
{notes}"""


def start_json(run: MadeUp) -> dict[str, Any]:
    """A model of the run's shape, but for a rope that was not stretched."""
    model = {**tomllib.loads(recipe_toml(run))["model"], "rope_theta": 500.0}
    return {
        "from": run.place, "name": "old", "model": model, "context_length": run.old_length, "weights_sha256": "ab" * 32,
    }  # fmt: skip


def since_start(run: MadeUp, old: int) -> list[dict[str, Any]]:
    """The old model, with its rope and the new one, which takes back half a nat past its length; and the stages."""
    names = ["start", "start, new rope", *run.names]
    rows = []
    end = run.lengths[-1] + 1
    for measure, first, stop in (("by_position", 1, old), ("by_position", old, end), ("fixed_target", end - 16, end)):
        past = stop > old
        begin = 3.0 + 0.9 * past
        losses = [begin, begin + (-0.5 if past else 0.02)]
        losses += [losses[1] + run.learnt * (1.0 if past else 0.1) * (n + 1) for n in range(len(run.names))]
        for at, (name, loss) in enumerate(zip(names, losses, strict=True)):
            changes = [
                {"against": other, "difference": loss - was, "low": loss - was - 0.03, "high": loss - was + 0.03}
                for other, was in zip(names[:at], losses[:at], strict=True)
            ]
            rows.append(
                {
                    "checkpoint": name, "measure": measure, "from": first, "to": stop, "loss": loss, "low": loss - 0.1,
                    "high": loss + 0.1, "documents": 40, "tokens": 9_600, "changes": changes,
                }
            )  # fmt: skip
    return rows


def taken_positions(run: MadeUp) -> list[int]:
    """Tokens after each step as they were taken, with the repeats of the resumes."""
    end = run.total if run.until is None else run.until
    taken: list[int] = []
    at = 0
    for killed, back in (*run.resumed_at, (end, 0)):
        taken += range(at + run.batch_tokens, killed + 1, run.batch_tokens)
        at = back // run.batch_tokens * run.batch_tokens
    return taken


def stage_of(run: MadeUp, tokens: int) -> int:
    """The stage of the step that ends at `tokens`."""
    ends = np.cumsum(run.steps) * run.batch_tokens
    return int(np.searchsorted(ends, tokens, side="left"))


def curve(run: MadeUp, tokens: np.ndarray) -> np.ndarray:
    """Expected training loss after `tokens`."""
    floor = math.log(run.vocab) * 0.36
    return floor + (math.log(run.vocab) - floor) * np.exp(-((tokens / run.total * 24) ** 0.42))


def write_metrics(path: Path, run: MadeUp, positions: list[int]) -> None:
    tokens = np.asarray(positions)
    noise = np.random.default_rng(run.seed).normal(size=(4, len(tokens)))
    stages = np.searchsorted(np.cumsum(run.steps) * run.batch_tokens, tokens, side="left")
    loss = curve(run, tokens) + 0.06 * noise[0]
    norm = 0.6 + 1.5 * np.exp(-tokens / run.total * 30) + 0.08 * np.abs(noise[1])
    if run.spike_at is not None:
        bump = np.exp(-np.clip(tokens - run.spike_at, 0, None) / (run.batch_tokens * 20)) * (tokens >= run.spike_at)
        loss, norm = loss + 2.2 * bump, norm + 9 * bump
    with path.open("w", encoding="utf-8") as file:
        for i, count in enumerate(positions):
            stage = int(stages[i])
            speed = run.speed / (1 + 0.18 * stage) * (1 + 0.02 * noise[2, i])
            used = f"{0.52 + 0.01 * noise[3, i]:.4f}" if run.flops else "null"
            done = count / run.total
            file.write(
                f'{{"step": {count // run.batch_tokens}, "tokens": {count}, '
                f'"stage": {json.dumps(run.names[stage])}, "length": {run.lengths[stage]}, '
                f'"loss": {loss[i]:.6f}, "grad_norm": {norm[i]:.5f}, "update_norm": {0.02 * norm[i]:.6f}, '
                f'"param_norm": {40 + 30 * done:.4f}, "lr": {0.005 * (0.55 + 0.45 * math.cos(math.pi * done)):.8f}, '
                f'"tokens_per_second": {speed:.1f}, "seconds": {run.batch_tokens / speed:.5f}, '
                f'"flops_utilisation": {used}, "loss_by_position": {{}}}}\n'
            )


def write_events(path: Path, run: MadeUp) -> None:
    lines: list[dict[str, Any]] = []
    end = run.total if run.until is None else run.until

    def say(kind: str, tokens: int, **more: Any) -> None:
        clock = START + tokens / run.speed + len(lines)
        lines.append({"kind": kind, "tokens": tokens, "step": tokens // run.batch_tokens, "time": clock, **more})

    say(
        "run_started",
        0,
        version="0.1.0",
        recipe=run.name,
        parameters=run.parameters,
        devices=["cpu:0"],
        train_tokens=dict.fromkeys(run.sources, 410_000),
        sources=run.sources,
    )
    begun = set()
    at = 0
    for killed, back in (*run.resumed_at, (end, 0)):
        for tokens in marks(run, at, killed):
            stage = stage_of(run, max(tokens, 1))
            if tokens % (run.total // run.pieces // run.batch_tokens * run.batch_tokens) == 0 and tokens:
                say_evaluation(say, run, tokens, stage)
            if stage not in begun:
                begun.add(stage)
                start = sum(run.steps[:stage]) * run.batch_tokens
                say(
                    "stage_started",
                    start,
                    stage=run.names[stage],
                    length=run.lengths[stage],
                    stage_tokens=run.steps[stage] * run.batch_tokens,
                    compile_seconds=3.2 + stage,
                )
            if tokens and tokens in np.cumsum(run.steps) * run.batch_tokens:
                say(
                    "checkpoint",
                    tokens,
                    path=f"checkpoints/{tokens}",
                    bytes=run.parameters * 12,
                    stage=run.names[stage],
                )
            elif tokens:
                say("checkpoint", tokens, path=f"checkpoints/{tokens}", bytes=run.parameters * 12, stage="")
        if killed != end:
            at = back // run.batch_tokens * run.batch_tokens
            say("resumed", at, reason="asked for")
    if end == run.total:
        say("finished", end, seconds=163.4 if run.total < 1e9 else 1.4e6, peak_memory_bytes=1_932_735_283)
    else:
        say("stopped", end, reason=run.reason)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def marks(run: MadeUp, start: int, end: int) -> list[int]:
    """Where something happens between `start` and `end`: equal pieces of the run and ends of stages."""
    piece = run.total // run.pieces // run.batch_tokens * run.batch_tokens
    ends = [int(count) for count in np.cumsum(run.steps) * run.batch_tokens]
    return sorted(
        {*range(0, end + 1, piece), *(count for count in ends if count <= end)} - set(range(0, start + 1))
        | ({0} if start == 0 else set())
    )


def say_evaluation(say: Any, run: MadeUp, tokens: int, stage: int) -> None:
    loss = float(curve(run, np.asarray(tokens))) + 0.04
    by_position = {str(start): loss + 2.6 * start**-0.7 - 0.1 for start in doublings(run.lengths[stage])}
    say(
        "evaluation",
        tokens,
        loss=loss,
        loss_by_position=by_position,
        documents=48,
        held_out_tokens=25_000,
        length=run.lengths[stage],
        seconds=1.25,
    )
    for prompt, text in run.samples:
        say("sample", tokens, prompt=prompt, text=text, document=run.document)


def doublings(length: int) -> list[int]:
    return [2**power for power in range(int(math.log2(length)))]


def loss_at(run: MadeUp, stage: int, context: int) -> float:
    """Loss of fixed targets with `context` tokens: the last checkpoint gains `run.gain` from a quarter."""
    base = 2.30 + 0.12 * (len(run.lengths) - 1 - stage)
    seen = min(context, run.lengths[stage])
    past = max(0.0, math.log2(context / run.lengths[stage]))
    return base + run.gain * math.log2(seen / run.contexts[0]) / 2 + run.blow_up * past


def measurements(run: MadeUp) -> dict[str, Any]:
    documents, tokens, size = 48, 96_123, 310_455
    out: dict[str, Any] = {
        "text": {"documents": documents, "tokens": tokens, "bytes": size, "xz_bits_per_byte": run.xz},
        "strided": [],
        "by_position": [],
        "fixed_target": [],
        "fixed_target_gain": [],
        "since_start": since_start(run, run.old_length) if run.old_length is not None else [],
        "notes": ["loss by position: 8 of 48 documents are shorter than 512 ids"],
    }
    scale = run.bits_per_byte / loss_at(run, len(run.names) - 1, run.contexts[-1])
    for stage, name in enumerate(run.checkpoints or run.names):
        for context in run.contexts:
            loss = loss_at(run, stage, context)
            out["strided"].append(
                {
                    "checkpoint": name,
                    "context": context,
                    "stride": max(1, context // 8),
                    "loss": loss,
                    "low": loss - 0.05,
                    "high": loss + 0.05,
                    "perplexity": math.exp(loss),
                    "bits_per_byte": loss * scale,
                    "documents": documents,
                    "tokens": tokens,
                }
            )
            out["fixed_target"].append(
                {
                    "checkpoint": name,
                    "context": context,
                    "target": max(8, run.lengths[-1] // 16),
                    "loss": loss,
                    "low": loss - 0.07,
                    "high": loss + 0.07,
                    "documents": 40,
                    "tokens": 9_600,
                }
            )
            if context != run.contexts[-1]:
                difference = loss_at(run, stage, run.contexts[-1]) - loss
                out["fixed_target_gain"].append(
                    {
                        "checkpoint": name,
                        "from_context": context,
                        "to_context": run.contexts[-1],
                        "difference": difference,
                        "low": difference - run.spread,
                        "high": difference + run.spread,
                        "documents": 40,
                    }
                )
        bins = []
        for start in doublings(run.lengths[-1]):
            loss = (
                2.2
                + 0.1 * (len(run.names) - 1 - stage)
                + 2.4 * start**-0.6
                + run.blow_up * max(0.0, math.log2(1.4 * start / run.lengths[stage]))
            )
            bins.append(
                {
                    "from": start,
                    "to": run.lengths[-1] if 2 * start == run.lengths[-1] else 2 * start - 1,
                    "loss": loss,
                    "low": loss - 0.3 * start**-0.3,
                    "high": loss + 0.3 * start**-0.3,
                    "tokens": 40 * start,
                }
            )
        out["by_position"].append({"checkpoint": name, "length": run.lengths[-1], "bins": bins, "documents": 40})
    return out
