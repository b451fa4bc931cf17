"""Differentially private diffusion transformers: models, an exact clipping engine, training."""

__version__ = "0.1.0"
