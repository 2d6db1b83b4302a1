"""Sweeps: many runs named by one file (points), what has become of them (record, runs), and who runs them."""
