"""Bundles: weights in a folder that a C program can map; `docs/bundles.md` has the format byte by byte."""
