"""Weights and routers learned from scored text."""
