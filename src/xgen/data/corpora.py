"""The sources of a recipe, opened: token stores as they are, texts prepared on the way."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from xgen.data.prepare import Progress, choose_tokenizer, prepare, quietly
from xgen.data.sources import EMBEDDED, TextFile, list_files
from xgen.data.store import TOKENIZER, Store, file_mark, is_store, open_store, read_manifest
from xgen.data.writer import write_json
from xgen.errors import DataError, StorageError
from xgen.folders import cache_folder
from xgen.recipe.schema import Recipe
from xgen.tokens.document import read_document
from xgen.tokens.tokenizer import Tokenizer, load_tokenizer


def open_sources(
    recipe: Recipe, base: Path, work: Path, progress: Progress | None = None, own: Tokenizer | None = None
) -> tuple[dict[str, Store], Tokenizer]:
    """The stores of all sources of the recipe, by name, and the tokenizer they share.

    Paths in the recipe are taken from `base`. A source of text ("embedded:NAME", a file, a folder) is prepared
    into `work/NAME`, and used again when its files, the tokenizer and the options are the same. "bpe:N" is trained
    on the training documents of all sources and kept in `work`, and in the user's cache for other runs. `own` is the
    tokenizer of a model that is continued: "store" is that one, and any other must be the same.

    Raises `DataError` when a source is missing, or its tokenizer is not the recipe's.
    """
    report = quietly if progress is None else progress
    places = {name: _place(name, given, base) for name, given in recipe.data.sources.items()}
    ready = {name: open_store(place) for name, place in places.items() if isinstance(place, Path)}
    raw = {name: place for name, place in places.items() if isinstance(place, _Raw)}
    if own is not None and recipe.tokenizer.name == "store":
        tokenizer = own
    else:
        tokenizer = _tokenizer(recipe, base, work, ready, raw, report)
        _check_own(tokenizer, own, recipe.tokenizer.name)
    if tokenizer.size > recipe.model.vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.name} has {tokenizer.size} ids and model.vocab_size is {recipe.model.vocab_size}; "
            "leave model.vocab_size out, or take a tokenizer of so many ids at most"
        )
    for name, store in ready.items():
        _check_tokenizer(name, store, tokenizer, recipe.tokenizer.name)
    made = {name: _prepared(name, texts, recipe, work, tokenizer, report) for name, texts in raw.items()}
    return {name: (ready | made)[name] for name in recipe.data.sources}, tokenizer


def reopen_sources(recipe: Recipe, base: Path, work: Path) -> tuple[dict[str, Store], Tokenizer]:
    """What `open_sources` opened before with the same `work`, from the stores alone: texts are not looked at,
    and nothing is written. Raises `DataError` when a store is missing."""
    stores = {}
    for name, given in recipe.data.sources.items():
        place = work / name if given.startswith(EMBEDDED) or not is_store(base / given) else base / given
        stores[name] = open_store(place)
    tokenizer = next(iter(stores.values())).tokenizer()
    for name, store in stores.items():
        _check_tokenizer(name, store, tokenizer, recipe.tokenizer.name)
    return stores, tokenizer


@dataclass(frozen=True)
class _Raw:
    """A source of text, still to be made into a store."""

    source: str | Path
    files: list[TextFile]

    def hashes(self) -> list[tuple[str, str]]:
        return [(file.name, file_mark(file.path).sha256) for file in self.files]


def _place(name: str, given: str, base: Path) -> Path | _Raw:
    """A ready store's folder, or the text to make one of."""
    if given.startswith(EMBEDDED):
        return _Raw(given, list_files(given))
    place = base / given
    if not place.exists():
        raise DataError(
            f"source {name!r}: there is no {given!r}; make it with `xgen prepare TEXTS --out {given}`, "
            f"or name yours with --data {name}=PATH"
        )
    return place if is_store(place) else _Raw(place, list_files(place))


def _tokenizer(
    recipe: Recipe,
    base: Path,
    work: Path,
    ready: Mapping[str, Store],
    raw: Mapping[str, _Raw],
    report: Progress,
) -> Tokenizer:
    name = recipe.tokenizer.name
    if name == "store":
        if not ready:
            raise DataError(
                'tokenizer.name is "store", and no source is a token store to take it from; '
                'choose "xgen", a tokenizer.json or "bpe:N"'
            )
        return next(iter(ready.values())).tokenizer()
    if not name.startswith("bpe:"):
        return load_tokenizer(name if name == "xgen" else str(base / name), recipe.tokenizer.end_of_text)
    if ready:
        raise DataError(
            f"tokenizer.name is {name!r}, to be trained now, but source {next(iter(ready))!r} is a token store made "
            "with a tokenizer of its own; take that with tokenizer.name=store"
        )
    return _trained(name, recipe, work, raw, report)


def _trained(name: str, recipe: Recipe, work: Path, raw: Mapping[str, _Raw], report: Progress) -> Tokenizer:
    """The tokenizer trained on the raw sources, from `work` when it was trained on the same before."""
    corpora = [texts for _, texts in sorted(raw.items())]
    origin = {
        "tokenizer": name,
        "held_out": recipe.data.held_out,
        "files": [texts.hashes() for texts in corpora],
        "library": tokenizers.__version__,
    }
    key = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
    record = work / "tokenizer.origin.json"
    if record.is_file() and (work / TOKENIZER).is_file() and json.loads(record.read_text()) == {"origin": key}:
        return load_tokenizer(str(work / TOKENIZER), recipe.tokenizer.end_of_text)
    report("training the tokenizer", 0.0)
    tokenizer = _learnt(name, key, corpora, recipe)
    try:
        work.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        tokenizer.save(work / TOKENIZER)
        write_json(record, {"origin": key})
    except OSError as cause:
        raise StorageError.writing(work, cause) from cause
    report("training the tokenizer", 1.0)
    return tokenizer


def _learnt(name: str, key: str, corpora: list[_Raw], recipe: Recipe) -> Tokenizer:
    """The tokenizer learnt from `corpora`, or what another run has learnt from them; `key` is a hash of all that
    decides it."""
    kept = cache_folder() / "tokenizers" / f"{key}.json"
    with suppress(DataError):  # not there, or cut off when a disk was full
        return Tokenizer(read_document(kept), name)
    lists = [texts.files for texts in corpora]
    tokenizer = choose_tokenizer(name, lists, recipe.data.held_out, "stop", recipe.tokenizer.end_of_text)
    with suppress(OSError, StorageError):  # the cache saves time, nothing else: a run goes on without it
        kept.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(kept)
    return tokenizer


def _check_own(tokenizer: Tokenizer, own: Tokenizer | None, wanted: str) -> None:
    """That the tokenizer which the recipe names is that of the model to be continued, if it has one."""
    if own is not None and _mark(own) != _mark(tokenizer):
        raise DataError(
            f"tokenizer.name is {wanted!r} ({tokenizer.size} ids, {_shown(tokenizer)}), and the model to be continued "
            f"has learnt another ({own.name}, {own.size} ids, {_shown(own)}); take its own with tokenizer.name=store"
        )


def _mark(tokenizer: Tokenizer) -> tuple[str, str]:
    return tokenizer.fingerprint, tokenizer.decode([tokenizer.end_of_text])


def _shown(tokenizer: Tokenizer) -> str:
    fingerprint, end_of_text = _mark(tokenizer)
    return f"{fingerprint[:12]}, documents end with {end_of_text}"


def _check_tokenizer(name: str, store: Store, tokenizer: Tokenizer, wanted: str) -> None:
    mark = store.manifest.tokenizer
    if mark.fingerprint == tokenizer.fingerprint and mark.end_of_text != tokenizer.decode([tokenizer.end_of_text]):
        raise DataError(
            f"source {name!r} ({store.path}) has {mark.end_of_text} between its documents, the run "
            f"{tokenizer.decode([tokenizer.end_of_text])}; prepare the text again with that --end-of-text"
        )
    if mark.fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"source {name!r} ({store.path}) was made with tokenizer {mark.name} ({mark.size} ids, "
            f"{mark.fingerprint[:12]}), the run uses {tokenizer.name} ({tokenizer.size} ids, "
            f"{tokenizer.fingerprint[:12]}, tokenizer.name={wanted}); prepare the text again with "
            "`xgen prepare --tokenizer`, or set tokenizer.name=store when all sources share one"
        )


def _prepared(name: str, texts: _Raw, recipe: Recipe, work: Path, tokenizer: Tokenizer, report: Progress) -> Store:
    """The store of a raw source in `work`, made unless it is there already."""
    place = work / name
    if is_store(place):
        if _is_current(place, texts, recipe, tokenizer):
            return open_store(place)
        shutil.rmtree(place)

    prepare(
        [texts.source],
        place,
        tokenizer,
        held_out=recipe.data.held_out,
        progress=lambda doing, fraction: report(f"{name}: {doing}", fraction),
    )
    return open_store(place)


def _is_current(place: Path, texts: _Raw, recipe: Recipe, tokenizer: Tokenizer) -> bool:
    manifest = read_manifest(place)
    return (
        manifest.tokenizer.fingerprint == tokenizer.fingerprint
        and manifest.options.held_out == recipe.data.held_out
        and [(source.name, source.sha256) for source in manifest.sources] == texts.hashes()
    )
