"""Measures this machine with any checkpoint, or with any published model on random weights."""
