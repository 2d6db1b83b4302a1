"""Positions as integers: grids, digits, permutations and random draws; no parameters."""
