"""Exact per-example gradient clipping: one interface, one registry of methods, one slow oracle."""

from dit_dp.clipping.registry import METHODS, Method, attach

__all__ = ["METHODS", "Method", "attach"]
