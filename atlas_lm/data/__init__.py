"""Tokenizers, corpora and the DataModule.

A *source* (`stdlib`, `text`, `tokens`, `hf`, `recall`) knows where sequences come from; `TokenDataModule` batches them,
shuffles them and resumes them. The protocols between the two are in `source.py`.
"""
