"""Vision encoders that several families share, one kind a file: where queries and keys are, what makes a token."""
