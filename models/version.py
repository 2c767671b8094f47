"""The version of the package, in one place (setup.cfg and the bundle's record read it)."""

__version__ = "0.1.0"
