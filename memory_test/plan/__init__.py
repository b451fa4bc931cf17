"""Which method, which physical batch and what noise fit a card and a privacy budget, before there is a GPU."""
