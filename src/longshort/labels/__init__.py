"""Sequences with labels: a class for each, or a tag for each of their steps."""
