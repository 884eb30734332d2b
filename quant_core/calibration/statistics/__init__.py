"""What is kept of a layer's inputs: Hessians, histograms, rows."""
