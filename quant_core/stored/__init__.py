"""Quantized layers as they are found in files: in ComfyUI's own form, older ones, and foreign ones."""
