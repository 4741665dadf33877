"""A model behind HTTP: what `longshort serve` runs."""
