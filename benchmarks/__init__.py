"""Paired, repeatable measurements against the tools that one would use otherwise: ``./doit benchmark``."""
