"""Capacity planning: how many completions an ensemble can generate, by a simulation of queues from measured costs."""
