"""Pure state, optimiser and step; the host loop that orders events."""
