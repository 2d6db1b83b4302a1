"""Positions as integers: grids, digits, prefix tries and random sampling; no parameters."""
