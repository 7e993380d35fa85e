"""The public operators: argument checks, documentation, and the choice between kernel and twin."""
