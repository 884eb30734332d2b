"""What the nodes do: one file per node that needs one, under the name of the node's own file, which holds the schema.

in_order.py and replay.py serve quantize_model.py.
"""
