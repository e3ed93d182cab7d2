"""LyCORIS as the judge of merged weights: the module's own forward, DoRA on either axis, linear and convolution.

ComfyUI 0.3.64 (``weight_decompose`` of comfy/weight_adapter/base.py) computes the same by input. By output it divides
by ‖W‖ where LyCORIS, with which such files are trained, divides by ‖W + ΔW‖: there we follow LyCORIS.
"""

import copy
from pathlib import Path

import pytest

import loralens
from loralens.core import LazyArray
from tests.merging.merged import merge_all
from tests.tolerances import LIVE_OUTPUT

torch = pytest.importorskip("torch")
pytest.importorskip("lycoris")
from lycoris.modules.locon import LoConModule  # noqa: E402
from lycoris.modules.loha import LohaModule  # noqa: E402
from lycoris.modules.lokr import LokrModule  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet_torch")]
NAME = "lora_unet_x"
ALGORITHMS = {"locon": LoConModule, "loha": LohaModule, "lokr": LokrModule}
LAYERS = {
    "linear": lambda: torch.nn.Linear(6, 8),
    "conv 3x3": lambda: torch.nn.Conv2d(6, 8, 3, padding=1),
    "conv 1x1": lambda: torch.nn.Conv2d(6, 8, 1),
    "square conv": lambda: torch.nn.Conv2d(6, 6, 3, padding=1),
}


@pytest.mark.parametrize("by_output", [False, True], ids=["by input", "by output"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_merged_layer_answers_as_lycoris_trained_it(
    algorithm: str, layer: str, tmp_path: Path, *, by_output: bool
) -> None:
    torch.manual_seed(3)
    base = LAYERS[layer]()
    adapted = ALGORITHMS[algorithm](
        NAME, copy.deepcopy(base), 1.0, lora_dim=2, alpha=1, weight_decompose=True, wd_on_out=by_output
    )
    for name, parameter in adapted.named_parameters():
        if name != "dora_scale":
            parameter.data.normal_(0, 0.3)
    adapted.dora_scale.data *= torch.rand_like(adapted.dora_scale) + 0.5
    state = {f"{NAME}.{key}": value.detach().contiguous() for key, value in adapted.custom_state_dict().items()}
    save_file(state, tmp_path / "lora.safetensors")
    adapted.apply_to()
    x = torch.randn(3, 6) if layer == "linear" else torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        before, expected = base(x), adapted(x)

    adapter = loralens.load(tmp_path / "lora.safetensors")
    assert {extra.role for extra in adapter.extra.values()} == {"magnitude" if by_output else "magnitude_in"}
    W = base.weight.detach().numpy().copy()
    (merged,) = merge_all([(adapter, 1.0)], {"x.weight": LazyArray.of(W)}).values()
    with torch.no_grad():
        base.weight.copy_(torch.from_numpy(merged))
        found = base(x)
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(found, expected, **LIVE_OUTPUT)
