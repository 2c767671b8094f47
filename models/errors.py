"""Every error a user can cause. Each message says what was found, what was expected and what to do."""


class PpexportError(Exception):
    """Base of all errors that ppexport raises on purpose; the command line prints it and exits with 1."""


class CheckpointError(PpexportError):
    """The Hugging Face checkpoint cannot be used: no config, unknown family, wrong or missing weights."""


class BundleError(PpexportError):
    """A bundle is damaged, incomplete or written by another schema version."""


class ImageError(PpexportError):
    """An image cannot be read, or its size is outside the limits."""


class RequestError(PpexportError, ValueError):
    """A request does not fit: wrong dtype or shape, too long a prompt, images that do not match the prompt."""


class SpaceError(PpexportError):
    """Not enough disk or memory for what was asked."""


class BackendError(PpexportError):
    """A backend is not installed or cannot run on this machine."""
