"""The nodes, one file each; extension.py lists them. Importing this package alone needs no ComfyUI."""
