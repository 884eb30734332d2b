"""The nodes, one file each; extension.py lists them. Importing this package alone needs no ComfyUI.

`execute` names its inputs where there are at most seven. A node with more takes `**values` and makes one frozen record
of them, whose fields have the inputs' names: an input that is missing or misspelt is a TypeError there.
"""
