"""Corpora in, token stores out, and the batch as a pure function of recipe and token position."""

from xgen.data.corpora import open_sources
from xgen.data.prefetch import prefetch
from xgen.data.prepare import prepare
from xgen.data.reader import Batch, Reader, Span
from xgen.data.sources import Document, read_documents
from xgen.data.store import Split, Store, open_store, verify

__all__ = [
    "Batch",
    "Document",
    "Reader",
    "Span",
    "Split",
    "Store",
    "open_sources",
    "open_store",
    "prefetch",
    "prepare",
    "read_documents",
    "verify",
]
