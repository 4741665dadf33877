"""Texts: tokenizers, corpora and batches."""
