"""Engines turn lists of programs into lists of outcomes; each is usable alone, none imports another."""
