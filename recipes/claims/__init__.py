"""The papers' claims about training, tested on mini. The results are in docs/training_claims.md."""
