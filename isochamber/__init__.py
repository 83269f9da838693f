"""Isochamber: make for tenant containers.

Data flows left to right: ``spec`` -> ``build`` -> containers.json -> ``launch``;
``tasks`` hangs the first half on doit's graph. See docs/explanation/architecture.md.
"""

__version__ = "0.1.0"
