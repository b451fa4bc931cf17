"""Predictions against torch's CUDA build and its real caching allocator, on a runtime that is emulated: no GPU."""
