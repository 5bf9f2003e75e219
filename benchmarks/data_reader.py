"""Tokens a second of one reader on one core: prints one JSON object.

    python benchmarks/data_reader.py [--store STORE] [--seconds 3]

Without a store it reads one made for the purpose: about 70M random tokens in documents of 20 to 20,000 tokens, evenly
over the orders of magnitude. Measured is processor time of `Reader.batch`, at batches of 64K tokens and of 8K.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from xgen.data.reader import Reader
from xgen.data.store import Manifest, Options, Store, open_store
from xgen.data.writer import SplitWriter, save_manifest, save_tokenizer, token_dtype, tokenizer_mark
from xgen.recipe.schema import Checkpoints, Data, Evaluation, Model, Optimizer, Recipe, Stage
from xgen.tokens.tokenizer import train_bpe

LENGTHS = (64, 2048, 8192)
BATCH_TOKENS = (8192, 65536)
TOKENS = 50_000_000


def synthetic_store(folder: Path) -> Store:
    """A store of random tokens."""
    rng = np.random.default_rng(0)
    tokenizer = train_bpe(["abc"], 257)
    lengths = (10 ** rng.uniform(np.log10(20), np.log10(20_000), TOKENS // 2000)).astype(np.int64)
    files = save_tokenizer(folder, tokenizer)
    with SplitWriter(folder / "train", token_dtype(tokenizer)) as writer:
        tokens = rng.integers(0, 257, int(lengths.sum())).astype(token_dtype(tokenizer))
        writer.add(tokens, lengths, lengths, np.zeros(0, np.uint8), 0 * lengths)
        train, written = writer.close()
    files |= written
    with SplitWriter(folder / "held_out", token_dtype(tokenizer)) as writer:
        held_out, written = writer.close()
    save_manifest(
        folder,
        Manifest(
            format=1,
            tokenizer=tokenizer_mark(tokenizer),
            dtype="uint16",
            options=Options(held_out=0, on_error="stop", text_field="text", split_field=None),
            train=train,
            held_out=held_out,
            duplicates=0,
            skipped={},
            sources=(),
            files=files | written,
        ),
    )
    return open_store(folder)


def recipe_of(length: int, batch_tokens: int) -> Recipe:
    """A run over two sources, both the same store."""
    stage = Stage(
        name="stage",
        length=length,
        tokens=10**12,
        batch_tokens=batch_tokens,
        microbatch_tokens=batch_tokens,
        mixture={"a": 0.7, "b": 0.3},
    )
    return Recipe(
        name="benchmark",
        model=Model(layers=1, hidden_size=8, heads=1, kv_heads=1, head_size=8, mlp_size=32, vocab_size=384),
        data=Data(sources={"a": "a", "b": "b"}),
        optimizer=Optimizer(learning_rate=1e-3, warmup=0),
        stages=(stage,),
        checkpoints=Checkpoints(every=10**9),
        evaluation=Evaluation(every=10**9, tokens=1000, contexts=(8, 16), target=4),
    )


def measure(store: Store, length: int, batch_tokens: int, seconds: float) -> dict[str, Any]:
    """Tokens a second of processor time, after a first batch that opens the order of the documents."""
    reader = Reader(recipe_of(length, batch_tokens), {"a": store, "b": store})
    reader.batch(0)
    start, batches = time.process_time(), 0
    while time.process_time() - start < seconds:
        batches += 1
        reader.batch(batches * batch_tokens)
    spent = time.process_time() - start
    return {
        "length": length,
        "batch_tokens": batch_tokens,
        "tokens_per_second": round(batches * batch_tokens / spent),
        "milliseconds_per_batch": round(1000 * spent / batches, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="a token store to read instead")
    parser.add_argument("--seconds", type=float, default=3.0, help="processor time for each figure")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(arguments.store) if arguments.store else synthetic_store(Path(folder))
        start = time.perf_counter()
        open_store(store.path)
        opening = time.perf_counter() - start
        rates = [
            measure(store, length, batch_tokens, arguments.seconds)
            for batch_tokens in BATCH_TOKENS
            for length in LENGTHS
        ]
    result = {
        "store_tokens": store.train.token_count,
        "store_documents": store.train.documents,
        "opening_seconds": round(opening, 4),
        "readers": 1,
        "rates": rates,
    }
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
