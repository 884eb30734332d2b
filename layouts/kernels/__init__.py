"""Triton kernels, each beside the plain torch function that specifies it. Importable without triton."""
