"""The engine: formats, algorithms and the streaming pipeline. Knows nothing of ComfyUI."""
