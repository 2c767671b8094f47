"""The version of the package, in one place (setup.cfg and the bundle's record read it)."""

__version__ = "0.8.0"


def release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: "10.15.1.29" -> (10, 15)."""
    return tuple(int(part) for part in version.split(".")[:2])


def installed(package: str) -> str | None:
    """The version of a package in this environment; None where it has none."""
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
