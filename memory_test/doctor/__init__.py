"""Checks that a private method keeps its promise on a given model, loss and batch."""
