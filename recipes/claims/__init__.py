"""What the papers claim about training, tried on mini; docs/training_claims.md is the page."""
