"""Tensors only: elements, scales, packing, rotations, how far two tensors are apart. No format and no file."""
