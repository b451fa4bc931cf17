"""Everything that is measured on a GPU, as one command in parts that can be stopped and taken up again."""
