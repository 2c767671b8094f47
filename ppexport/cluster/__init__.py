"""Copies of a bundle on the machines of a Ray cluster: ``serve --ray`` and ``batch --ray``."""
