"""The fixed scale of a layer's inputs: its rule, and where the magnitudes come from."""
