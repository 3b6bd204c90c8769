"""The passes: one job a file, plain functions from facts to facts; only the pipeline calls them."""
