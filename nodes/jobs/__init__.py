"""What the nodes do, one file per node that needs one; the node's own file holds its schema."""
