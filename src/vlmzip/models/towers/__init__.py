"""Vision encoders that several families share, one kind per file."""
