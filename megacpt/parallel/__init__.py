"""Mesh, collectives and the parallel layers."""
