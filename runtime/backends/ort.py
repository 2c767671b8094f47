"""ONNX Runtime on the CPU: graphs run with IO binding on memory that numpy owns."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...models.checks import utf8
from ...models.dtype import BY_NAME
from ...models.errors import BackendError, PpexportError
from ...models.version import release
from .host import HostMemory
from .session import Buffer


def import_onnxruntime(device: str) -> Any:
    """The module; raises BackendError that names the extra to install for a device, "cpu" or "cuda".

    Nothing else imports it, since it stores an identifier of the device and sends reports from its first import on
    (from 1.29 on; earlier on Windows only) unless it is told not to: by the environment, since its function for that
    comes too late.
    """
    for variable in NO_TELEMETRY:
        os.environ[variable] = "1"
    try:
        import onnxruntime
    except ImportError as err:
        raise BackendError(
            f"onnxruntime is not installed, expected for device '{device}'; install it with: "
            f"pip install 'ppexport[{device}]'"
        ) from err
    onnxruntime.disable_telemetry_events()
    return onnxruntime


NO_TELEMETRY = ("ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED")  # the name differs between releases
FIRST_WITH_BYTE_MAX = (1, 24)  # release of ONNX Runtime
FIRST_WITH_DELTA_RULE = (1, 30)  # with LinearAttention and CausalConvWithState
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3  # malloc.h of glibc


@contextmanager
def _thrifty() -> Iterator[None]:
    """Inside, every weight is an allocation of its own, so that it goes back to the system when it is freed.

    ONNX Runtime transposes and repacks weights while it loads a graph; the C library of Linux would keep what that
    frees, a third of an int4 model. Others have no such switch. Afterwards large activations go back, too, and with
    them large blocks of everything else in the process: among smaller ones they would leave holes that the next,
    larger image does not fit into (bench/lengths.py). ONNX Runtime keeps its own for the next run.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt, trim = (getattr(libc, name, None) for name in ("mallopt", "malloc_trim"))
    if mallopt is None or trim is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, 256 << 10)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, 8 << 20)
        mallopt(M_TRIM_THRESHOLD, 64 << 20)
        trim(0)


class OrtBinding:
    """IO binding on raw pointers; keeps the bound buffers alive."""

    def __init__(self, session: Any):
        self._session = session
        self._io = session.io_binding()
        self._bound: dict[str, Buffer] = {}

    def input(self, name: str, buffer: Buffer) -> None:
        """See session.Binding."""
        self._bound[name] = buffer
        self._io.bind_input(name, "cpu", 0, BY_NAME[buffer.dtype].numpy, buffer.shape, buffer.pointer)

    def output(self, name: str, buffer: Buffer) -> None:
        """See session.Binding."""
        self._bound[name] = buffer
        self._io.bind_output(name, "cpu", 0, BY_NAME[buffer.dtype].numpy, buffer.shape, buffer.pointer)

    def run(self) -> None:
        """See session.Binding."""
        try:
            self._session.run_with_iobinding(self._io)
        except Exception as err:
            raise BackendError(f"ONNX Runtime could not run the graph: {err}") from err


class OrtSession:
    """An onnxruntime.InferenceSession."""

    def __init__(self, session: Any):
        self._session = session
        self.inputs: Sequence[str] = [value.name for value in session.get_inputs()]
        self.outputs: Sequence[str] = [value.name for value in session.get_outputs()]

    def binding(self) -> OrtBinding:
        """See session.Session."""
        return OrtBinding(self._session)


class OrtCpu(HostMemory):
    """The backend. ``threads``: threads per graph, 0 for one per core."""

    name = "onnxruntime-cpu"
    device = "cpu"
    batches = True

    def __init__(self, threads: int = 0):
        self._ort = import_onnxruntime("cpu")
        self._threads = threads
        self.notes: list[str] = []
        self.byte_max = release(self._ort.__version__) >= FIRST_WITH_BYTE_MAX

    def session(self, path: Path) -> OrtSession:
        """See session.Backend. Raises BackendError quoting ONNX Runtime if it refuses the graph."""
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3  # errors only
        # each graph has threads of its own, which would go on spinning for work while the next graph runs
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # products with weights in blocks: inputs are rounded to int8, too, for integer arithmetic
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
        try:
            with _thrifty():
                session = self._ort.InferenceSession(utf8(path), options, providers=["CPUExecutionProvider"])
        except PpexportError:
            raise
        except Exception as err:
            raise BackendError(
                f"ONNX Runtime {self._ort.__version__} cannot load {path.name}: {err}; "
                "build the bundle again, or install a newer onnxruntime"
            ) from err
        return OrtSession(session)
