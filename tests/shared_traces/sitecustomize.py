"""Python imports this when it starts a command of the tests: conftest.py puts this folder on its path."""

import share_traces  # noqa: F401
import without_openvino  # noqa: F401
