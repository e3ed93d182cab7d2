"""What the tests of file formats share."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def quiet_torch() -> Iterator[None]:
    """Torch on one thread and transformers silent; skips where they are not installed."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
