"""Longshort beside its peers, measured in turns: what `longshort bench` runs."""
