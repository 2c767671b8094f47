"""The emulated TensorRT takes what every real one takes: names and numbers of arguments, held against the bindings.

Their wheels are small and come without the libraries, of which they want a few C functions: stubs of those are enough
to import them, so that their own signatures can be read.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from typing import Any

import emulator
import pytest
from test_emulator import INNER, OWN

VERSIONS = {
    "10.3": "tensorrt-cu12-bindings==10.3.0",
    "10.15": "tensorrt-cu12-bindings==10.15.1.29",
    "11.4": "tensorrt-cu13-bindings==11.4.0.106",
}
LACKING = {  # what the code looks for before it calls it
    "10.3": {"Builder.build_serialized_network_to_stream", "IStreamWriter"},
}
RTX = {  # what is called for TensorRT-RTX alone
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "ICudaEngine.create_runtime_config",
}
WANTED = [
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
]
LOOK = """
import ctypes, json, sys
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
sys.path.insert(0, sys.argv[2])
import tensorrt_bindings as trt
print(json.dumps({
    name: {member: getattr(getattr(trt, name), member).__doc__ or "" for member in dir(getattr(trt, name))}
    for name in json.loads(sys.argv[3]) if hasattr(trt, name)
}))
"""


def emulated(rtx: bool = False) -> dict[str, type]:
    """Classes of TensorRT, or of TensorRT-RTX."""
    only = (*emulator.RTX_ONLY, emulator.IRuntimeConfig)
    return {
        name: value
        for name, value in vars(emulator).items()
        if isinstance(value, type) and value.__module__ == "emulator" and name not in OWN
        if rtx or value not in only
    }


@pytest.fixture(scope="module", params=[*VERSIONS, "rtx"])
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def real(version: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Class -> member -> its docstring, which begins with its signature."""
    if version == "rtx":
        trt = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is for x86-64 only")
        return {
            name: {
                member: getattr(getattr(trt, name), member).__doc__ or ""
                for member in dir(getattr(trt, name))
            }
            for name in emulated(rtx=True)
        }
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("stub libraries need Linux and a C compiler")
    work = tmp_path_factory.mktemp("bindings")
    fetch = [
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(work),
        VERSIONS[version],
    ]
    fetched = subprocess.run(
        [sys.executable, "-m", "pip", *fetch], capture_output=True, text=True, timeout=300, check=False
    )
    wheels = list(work.glob("*.whl"))
    if not wheels:
        pytest.skip(f"pip has no {VERSIONS[version]}: {fetched.stderr.strip()[-200:]}")
    shutil.unpack_archive(wheels[0], work, "zip")
    source = work / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in WANTED), encoding="ascii")
    number = version.partition(".")[0]
    # one library under the names of three
    for name in ("libnvonnxparser", "libnvinfer_plugin", "libnvinfer"):
        soname = f"{name}.so.{number}"
        command = [
            compiler,
            "-shared",
            "-fPIC",
            f"-Wl,-soname,{soname}",
            "-o",
            str(work / soname),
            str(source),
        ]
        subprocess.run(command, check=True, timeout=60)
    loaded = work / f"libnvinfer.so.{number}"
    found = subprocess.run(
        [sys.executable, "-c", LOOK, str(loaded), str(work), json.dumps(list(emulated()))],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"LD_LIBRARY_PATH": str(work), "PATH": ""},
    )
    assert found.returncode == 0, found.stderr
    result: dict[str, dict[str, str]] = json.loads(found.stdout)
    return result


def counts(signature: str) -> tuple[int, int]:
    """The least and the largest number of arguments of "name(self: X, a: int, b: int = 3) -> Y", without self."""
    inside = signature[signature.index("(") + 1 : signature.rindex(")")]
    inside = re.sub(r"<[^<>]*>|\[[^\[\]]*\]|\([^()]*\)", "", inside)
    given = [part for part in inside.split(",") if part.strip() and part.strip() not in ("/", "*")][1:]
    return sum("=" not in part for part in given), len(given)


def fits(own: Any, doc: str, name: str) -> bool:
    """Does any of the signatures in a docstring take what the emulated function takes?"""
    signatures = re.findall(rf"^(?:\d+\. )?{name}\(.*\).*$", doc, re.M)
    wanted = list(inspect.signature(own).parameters.values())[1:]
    least = sum(p.default is p.empty for p in wanted)
    ranges = [counts(signature) for signature in signatures if "*args" not in signature]
    return any(low <= least and len(wanted) <= high for low, high in ranges)


def test_signatures(version: str, real: dict[str, dict[str, str]]) -> None:
    checked = 0
    lacking = LACKING.get(version, set())
    for name, value in emulated(version == "rtx").items():
        if name not in real:
            assert name in lacking, name
            continue
        for member, own in vars(value).items():
            if member.startswith("_") or member in INNER:
                continue
            if member not in real[name]:
                assert f"{name}.{member}" in lacking | RTX, f"{name}.{member}"
                continue
            if inspect.isfunction(own) and name not in ("ILogger", "IStreamWriter"):
                assert fits(own, real[name][member], member), f"{name}.{member}: {real[name][member][:200]}"
                checked += 1
    assert checked >= 24
    for missing in lacking:
        name, _, member = missing.partition(".")
        assert name not in real or member not in real[name], f"{missing} is there"
