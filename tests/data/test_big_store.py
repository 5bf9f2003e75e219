"""A store larger than memory opens at once: nothing is read but the manifest and the headers."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from synthetic import recipe_of, stage

from xgen.data.reader import Reader
from xgen.data.store import Manifest, Options, SplitCounts, open_store
from xgen.data.writer import SplitWriter, save_manifest, save_tokenizer, token_dtype, tokenizer_mark
from xgen.tokens.tokenizer import train_bpe

TOKENS = 5_000_000_000
DOCUMENTS = 500_000


@pytest.fixture(scope="module")
def big_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 GB of tokens, all zero, in a file without blocks; half a million documents."""
    folder = tmp_path_factory.mktemp("big")
    tokenizer = train_bpe(["abc"], 257)
    files = save_tokenizer(folder, tokenizer)
    counts = {}
    for split in ("train", "held_out"):
        with SplitWriter(folder / split, token_dtype(tokenizer)) as writer:
            counts[split], written = writer.close()
        files |= written
    lengths = np.full(DOCUMENTS, TOKENS // DOCUMENTS)
    for name in ("offsets", "name_offsets"):
        np.save(
            folder / f"train/{name}.npy",
            np.concatenate([[0], np.cumsum(lengths if name == "offsets" else 0 * lengths)]),
        )
    np.save(folder / "train/bytes.npy", lengths)
    os.truncate(folder / "train/tokens.bin", 2 * TOKENS)
    files = {name: file.model_copy(update={"bytes": (folder / name).stat().st_size}) for name, file in files.items()}
    manifest = Manifest(
        format=1,
        tokenizer=tokenizer_mark(tokenizer),
        dtype="uint16",
        options=Options(held_out=0, on_error="stop", text_field="text", split_field=None),
        train=SplitCounts(documents=DOCUMENTS, tokens=TOKENS, text_bytes=TOKENS),
        held_out=counts["held_out"],
        duplicates=0,
        skipped={},
        sources=(),
        files=files,
    )
    save_manifest(folder, manifest)
    return folder


def test_ten_gigabytes_open_in_under_a_second(big_store: Path) -> None:
    assert (big_store / "train/tokens.bin").stat().st_size == 10_000_000_000
    start = time.process_time()  # a machine busy with other work is not the store's fault
    store = open_store(big_store)
    assert time.process_time() - start < 1.0
    assert store.train.token_count == TOKENS
    reader = Reader(recipe_of(stage(2048, 10_000_000, {"a": 1.0}, sequences=16)), {"a": store})
    assert reader.batch(0).ids.shape == (16, 2048)
    assert time.process_time() - start < 2.0  # and the order of half a million documents is no delay
