"""Position encodings: integer positions in, a `PositionSignal` out."""
