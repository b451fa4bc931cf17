"""A model before it is trained: its tree, its parameters, and which method can run on which layer."""
