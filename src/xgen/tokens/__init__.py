"""Tokenizers: XGen's own, any `tokenizer.json`, and byte-level BPE learnt from one's own text."""
