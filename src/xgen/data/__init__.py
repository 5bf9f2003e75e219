"""Corpora in, token stores out, and the batch as a pure function of recipe and token position.

sources -> parts -> roles -> writer      text into a store            (prepare)
store -> stream -> reader -> prefetch    a store into batches         (order: which comes when)
corpora                                  the sources of a recipe, opened
"""
