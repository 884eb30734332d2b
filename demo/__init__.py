"""The demo: one small trained model in every format, sampled and shown beside the original. Needs no ComfyUI."""
