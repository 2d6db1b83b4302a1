"""The machine a run is on: processes, devices, files, progress."""
