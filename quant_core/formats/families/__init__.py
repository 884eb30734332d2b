"""What formats share: plain tensors, tensors padded to tiles, and codes of a codebook."""
