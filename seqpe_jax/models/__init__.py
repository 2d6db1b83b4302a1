"""Transformers that read tokens and a position signal; they know no encoding and no mesh."""
