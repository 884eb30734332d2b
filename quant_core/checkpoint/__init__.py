"""What is on disk: reading (source), writing (sink) and describing (metadata) checkpoint files."""
