"""Routers: weights for a state. An ensemble with fixed weights is the simplest of them (paper, section 3.4)."""

from mixlm.routing.base import Router
from mixlm.routing.fixed import Fixed

__all__ = ["Fixed", "Router"]
