"""Many cells: the grid, the worker process of each, the runner that turns what happens into records."""
