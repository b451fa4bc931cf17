"""CUDA memory and step time without a GPU: a traced step, replayed through a model of the caching allocator."""
