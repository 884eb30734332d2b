"""Tensors only: elements, scales, packing, rotations, and how far two tensors are apart. Knows no format and no file."""
