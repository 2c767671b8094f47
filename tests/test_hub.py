"""Checkpoints by their name on the hub, against a local server: what is fetched, what is said when it cannot be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundles import tiny_checkpoint
from hub import COMMIT, OLD, Hub, serving

from ppexport.runtime.bundle import open_bundle

NAME = "somebody/tiny-vl"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards, and files that an export has no use for."""
    from ppexport.exporters.random_checkpoint import random_config, write_random

    directory = tmp_path_factory.mktemp("hub") / "tiny"
    tiny_checkpoint(directory)
    for file in directory.glob("*.safetensors"):
        file.unlink()
    write_random(random_config("qwen3_vl", "tiny"), directory, shard_bytes=300_000)
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    for name in ("README.md", "pytorch_model.bin", "consolidated.safetensors", "vocab.json"):
        (directory / name).write_text("not for us")
    return directory


@pytest.fixture
def hub(repository: Path, tmp_path: Path) -> Iterator[Hub]:
    other = shutil.copytree(repository, tmp_path / "old")
    (other / "generation_config.json").write_text('{"eos_token_id": 7}')
    alien = tmp_path / "alien"
    alien.mkdir()
    (alien / "config.json").write_text('{"model_type": "bert"}')
    (alien / "model.safetensors").write_bytes(b"large")
    hub = Hub(
        {NAME: {COMMIT: repository, OLD: other}, "a/bert": {COMMIT: alien}, "a/secret": {COMMIT: repository}},
        {"a/secret": "hf_opens"},
    )
    with serving(hub):
        yield hub


def ppexport(
    hub_url: str, cache: Path, *args: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: huggingface_hub reads the environment when it is imported."""
    return python(hub_url, cache, "-m", "ppexport", *map(str, args), **environment)


def python(hub_url: str, cache: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": hub_url, "HF_HOME": str(cache), **environment}
    return subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, timeout=300)


FETCH = """import sys
from ppexport.exporters.hub import find
found = find(sys.argv[1], sys.argv[2] or None)
print(found.revision, found.path)"""


def fetched(hub_url: str, cache: Path, name: str, revision: str = "", **environment: str) -> tuple[str, Path]:
    """What a build fetches first: the commit, and the directory in the cache. Raises AssertionError."""
    done = python(hub_url, cache, "-c", FETCH, name, revision, **environment)
    assert done.returncode == 0, done.stderr
    commit, path = done.stdout.split()
    return commit, Path(path)


def test_a_name_builds_as_its_directory_does(hub: Hub, repository: Path, tmp_path: Path) -> None:
    done = ppexport(hub.url, tmp_path / "hf", "build", NAME, "-o", tmp_path / "bundle")
    assert done.returncode == 0, done.stderr
    needed = {file.name for file in repository.iterdir()} - {
        "README.md",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "vocab.json",
    }
    assert hub.files() == needed
    _, manifest = open_bundle(tmp_path / "bundle")
    assert (manifest.source.name, manifest.source.revision) == (NAME, COMMIT)
    assert set(manifest.source.sha256) == {n for n in needed if n.startswith("model-") or n == "config.json"}

    # from the cache: nothing is fetched again, and no network is needed
    hub.asked.clear()
    args = ("build", NAME, "-o", tmp_path / "again", "-q")
    done = ppexport("http://127.0.0.1:9", tmp_path / "hf", *args, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert hub.asked == []
    first, second = ((tmp_path / name / "language.onnx").read_bytes() for name in ("bundle", "again"))
    assert first == second

    done = ppexport(hub.url, tmp_path / "hf", "verify", tmp_path / "bundle", "--against", NAME, "-n", 4)
    assert done.returncode == 0, done.stderr
    assert "was not built from" not in done.stderr


def test_a_revision(hub: Hub, tmp_path: Path) -> None:
    commit, path = fetched(hub.url, tmp_path / "hf", NAME, "v1")
    assert commit == OLD
    assert json.loads((path / "generation_config.json").read_text()) == {"eos_token_id": 7}


def test_a_token_opens_a_private_one(hub: Hub, tmp_path: Path) -> None:
    args = ("build", "a/secret", "-o", tmp_path / "bundle", "-q")
    done = ppexport(hub.url, tmp_path / "hf", *args)
    assert done.returncode == 1
    assert "it was not found, or it is private" in done.stderr
    fetched(hub.url, tmp_path / "hf", "a/secret", HF_TOKEN="hf_opens")


def test_another_family_is_refused_before_its_weights_are_fetched(hub: Hub, tmp_path: Path) -> None:
    done = ppexport(hub.url, tmp_path / "hf", "build", "a/bert", "-o", tmp_path / "bundle", "-q")
    assert done.returncode == 1
    assert (
        "model_type is 'bert', expected one of: llava, llava_next, qwen2_5_vl, qwen2_vl, qwen3_5, "
        "qwen3_5_text, qwen3_vl" in done.stderr
    )
    assert hub.files() == {"config.json"}


@pytest.mark.parametrize(
    ("args", "environment", "message"),
    [
        ((NAME, "--revision", "v9"), {}, f"{NAME}: has no revision 'v9'"),
        (
            ("nobody/nothing",),
            {},
            "nobody/nothing: there is no such directory, and as a name on the Hugging Face hub",
        ),
        (
            (NAME,),
            {"HF_HUB_OFFLINE": "1"},
            "it is not (or not whole) in the cache, and cannot be fetched: HF_HUB_OFFLINE is set",
        ),
        (
            (NAME,),
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "it is not (or not whole) in the cache, and cannot be fetched: Conn",
        ),
        ((".", "--revision", "v1"), {}, ".: a revision (v1) goes with a name on the hub"),
        (("no/such/directory",), {}, "no/such/directory: no such directory; expected"),
    ],
)
def test_one_clear_line(
    args: tuple[str, ...], environment: dict[str, str], message: str, hub: Hub, tmp_path: Path
) -> None:
    done = ppexport(hub.url, tmp_path / "hf", "build", *args, "-o", tmp_path / "bundle", "-q", **environment)
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert message in lines[-1]
    assert len(lines) == 1, done.stderr
    assert not (tmp_path / "bundle").exists()


def test_a_connection_that_breaks(hub: Hub, repository: Path, tmp_path: Path) -> None:
    hub.cut.add(max(repository.glob("model-*.safetensors")).name)
    args = ("build", NAME, "-o", tmp_path / "bundle", "-q")
    done = ppexport(hub.url, tmp_path / "hf", *args)
    assert done.returncode == 1
    assert f"{NAME}: cannot be fetched from the hub: " in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bundle").exists()
    hub.cut.clear()
    fetched(hub.url, tmp_path / "hf", NAME)


def test_weights_that_are_no_safetensors(hub: Hub, repository: Path, tmp_path: Path) -> None:
    only = shutil.copytree(repository, tmp_path / "only")
    for file in only.glob("model*.safetensors*"):
        file.unlink()
    hub.repositories["a/bin"] = {COMMIT: only}
    done = ppexport(hub.url, tmp_path / "hf", "build", "a/bin", "-o", tmp_path / "bundle", "-q")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "a/bin: has no model.safetensors and no model.safetensors.index.json at the hub" in line


def test_verify_takes_the_commit_that_was_built(hub: Hub, repository: Path, tmp_path: Path) -> None:
    """Though the repository has moved on since."""
    hub.repositories["a/moving"] = {COMMIT: repository}
    done = ppexport(hub.url, tmp_path / "hf", "build", "a/moving", "-o", tmp_path / "bundle", "-q")
    assert done.returncode == 0, done.stderr
    hub.asked.clear()
    args = ("verify", tmp_path / "bundle", "--against", "a/moving", "-n", 4)
    done = ppexport(hub.url, tmp_path / "hf", *args)
    assert done.returncode == 0, done.stderr
    assert not [path for path in hub.asked if path.endswith("/revision/main")]


def test_a_gated_one(hub: Hub, tmp_path: Path) -> None:
    hub.gated.add(NAME)
    done = ppexport(hub.url, tmp_path / "hf", "build", NAME, "-o", tmp_path / "bundle", "-q")
    assert done.returncode == 1
    assert "is gated: ask for access" in done.stderr.strip().splitlines()[-1]


def test_a_download_goes_on_where_it_stopped(hub: Hub, repository: Path, tmp_path: Path) -> None:
    """A shard that is not there is an error that names it; once it is, only that one is fetched."""
    broken = shutil.copytree(repository, tmp_path / "broken")
    last = max(broken.glob("model-*.safetensors"))
    last.unlink()
    hub.repositories["a/broken"] = {COMMIT: broken}
    args = ("build", "a/broken", "-o", tmp_path / "bundle", "-q")
    done = ppexport(hub.url, tmp_path / "hf", *args)
    assert done.returncode == 1
    assert last.name in done.stderr
    assert not (tmp_path / "bundle").exists()
    shutil.copyfile(repository / last.name, last)
    shutil.rmtree(tmp_path / "hf" / "hub" / "models--a--broken" / "trees", ignore_errors=True)
    hub.asked.clear()
    fetched(hub.url, tmp_path / "hf", "a/broken")
    assert hub.files() == {last.name}
