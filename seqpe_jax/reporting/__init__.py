"""Folders of runs -> tables, plots and pages; nothing but files is read here."""
