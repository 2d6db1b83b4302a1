"""Cost of a step: times on this machine; memory, traffic and a bound on speed for TPU slices that are not here."""
