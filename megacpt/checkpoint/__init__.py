"""Checkpoints that are complete and verified, or not published."""
