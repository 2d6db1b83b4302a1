"""Transformers over tokens or patches with a position signal, attention backends, and models from configs; no mesh."""
