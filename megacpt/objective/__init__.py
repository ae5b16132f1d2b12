"""What is minimised: pure functions from log-probabilities to a weight a token."""
