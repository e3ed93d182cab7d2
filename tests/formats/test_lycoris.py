"""LyCORIS: every algorithm against its own forward pass, and what is refused or rides along."""

from pathlib import Path

import numpy as np
import pytest

from loralens import FormatError, LowRank, ShapeError
from tests.formats.dialects import FORM
from tests.formats.files import read_safetensors
from tests.formats.stores import number, stored
from tests.tolerances import BACKWARD, MOVED, PEFT_UPDATE

kohya = FORM["kohya"]
lycoris = FORM["lycoris"]

CONFORMANCE = Path(__file__).parent.parent / "conformance"
X = "lora_unet_x"
EPS32 = float(np.finfo(np.float32).eps)


@pytest.fixture(scope="module")
def oracle():
    """LyCORIS itself, on one thread."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("lycoris")
    from tests.conformance import make_lycoris

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make_lycoris
    torch.set_num_threads(threads)


def drawn(*shape, seed=0, dtype=np.float32):
    return number(shape, [seed, *shape], dtype)


def under(name, **tensors):
    """Keys of one module; ``_dot_`` stands for a dot."""
    return {f"{name}.{part.replace('_dot_', '.')}": array for part, array in tensors.items()}


def loha(out=20, in_=24, r=2, *, dtype=np.float32, **more):
    factors = {f"hada_w{n}_a": drawn(out, r, seed=n, dtype=dtype) for n in (1, 2)}
    factors |= {f"hada_w{n}_b": drawn(r, in_, seed=n, dtype=dtype) for n in (1, 2)}
    return under(X, **factors, **more)


def lokr(**more):
    """(3, 2) ⊗ (4, 6) of inner dimension 1."""
    return under(X, lokr_w1=drawn(3, 2), lokr_w2_a=drawn(4, 1), lokr_w2_b=drawn(1, 6), **more)


def of_network(over, oracle):
    return stored({key: tensor.numpy() for key, tensor in oracle.stored(over).items()})


def reader(held):
    """The one format that says the file is its own."""
    (found,) = [module for module in (kohya, lycoris) if module.detect(held)]
    return found


# --- against LyCORIS itself ---

CASES = sorted(folder.name for folder in CONFORMANCE.glob("*") if folder.is_dir())


DORA = [name for name in CASES if "dora" in name and name.startswith(("kohya", "lycoris"))]


@pytest.mark.parametrize("case", DORA)
def test_magnitudes_are_those_of_the_forward_pass(case, oracle):
    """W' = m · (W + ΔW)/‖W + ΔW‖, the norm over all but the axis of m."""
    model, before, over = oracle.network(oracle.CASES[case], seed=2)
    held = of_network(over, oracle)
    read = reader(held).read(held)
    assert len(read.extra) == 2
    added = oracle.added(model, before, over, dora=True)
    for key, extra in read.extra.items():
        weight = before[extra.module.removeprefix("lycoris_")].numpy()
        whole = weight + read[extra.module].dense()
        channels = extra.tensor.size
        m = extra.tensor.read().astype(np.float64).ravel()
        if extra.role == "magnitude":
            scaled = whole * (m / np.linalg.norm(whole, axis=1))[:, None]
        else:
            cube = whole.reshape(len(whole), channels, -1)
            scaled = (cube * (m / np.linalg.norm(cube, axis=(0, 2)))[None, :, None]).reshape(whole.shape)
        np.testing.assert_allclose(scaled - weight, added[extra.module].numpy(), **PEFT_UPDATE)
        assert abs(scaled - whole).max() > MOVED, key


@pytest.mark.parametrize("name", ["glora", "ia3", "diag-oft", "boft", "tlora"])
def test_updates_that_are_no_sum_are_refused_by_name(name, oracle):
    _, _, over = oracle.network(oracle.FOREIGN[name])
    held = of_network(over, oracle)
    assert reader(held) is lycoris
    words = {"glora": "GLoRA", "ia3": r"\(IA\)³", "diag-oft": "OFT", "boft": "BOFT", "tlora": "T-LoRA"}
    with pytest.raises(FormatError, match=f"no update that is a sum: 2 modules of .*{words[name]}"):
        lycoris.read(held)


# --- scales ---


def test_alpha_over_the_inner_dimension():
    assert lycoris.read(stored(loha(alpha=np.float32(3))))[X].scale == 1.5
    assert lycoris.read(stored(loha()))[X].scale == 1.0
    assert lycoris.read(stored(lokr(alpha=np.float32(3))))[X].scale == 3.0


def test_two_full_sides_take_no_alpha():
    tensors = under(X, lokr_w1=drawn(3, 2), lokr_w2=drawn(4, 6), alpha=np.float32(9999999999))
    module = lycoris.read(stored(tensors))[X]
    assert (module.scale, module.scaling.formula) == (1.0, "given")
    assert "both sides are full" in str(module.scaling)


# --- pairs and forms ---


@pytest.mark.parametrize("w1", [(2, 3), (1, 4)])
@pytest.mark.parametrize("w2", [(4, 7, 3), (7, 4, 2), (6, 6, 5)])
@pytest.mark.parametrize("full", [(True, False), (False, False), (True, True)])
def test_kronecker_products_of_any_shape(w1, w2, full):
    """Full and factored sides, tall and flat, narrow and wide: update, spectrum and rank are those of the dense one."""
    (a, c), (b, d, r) = w1, w2
    sides = {"lokr_w1": drawn(a, c)} if full[0] else {"lokr_w1_a": drawn(a, r), "lokr_w1_b": drawn(r, c, seed=5)}
    sides |= {"lokr_w2": drawn(b, d)} if full[1] else {"lokr_w2_a": drawn(b, r), "lokr_w2_b": drawn(r, d, seed=6)}
    first = sides["lokr_w1"] if full[0] else sides["lokr_w1_a"].astype(float) @ sides["lokr_w1_b"].astype(float)
    second = sides["lokr_w2"] if full[1] else sides["lokr_w2_a"].astype(float) @ sides["lokr_w2_b"].astype(float)
    module = lycoris.read(stored(under(X, **sides)))[X]
    dense = np.kron(first.astype(float), second.astype(float))
    s = np.linalg.svd(dense, compute_uv=False)
    assert module.shape == dense.shape == (a * b, c * d)
    assert module.rank == np.linalg.matrix_rank(dense)
    assert isinstance(module, LowRank) == (module.rank <= min(dense.shape) / 2)
    rounded = EPS32 if isinstance(module, LowRank) else BACKWARD
    np.testing.assert_allclose(module.dense(), dense, rtol=0, atol=4 * rounded * s[0])
    found = module.singular_values()
    np.testing.assert_allclose(found, s[: len(found)], rtol=0, atol=4 * rounded * s[0])


# --- what stands beside updates ---


def test_differences_of_biases_and_norms_ride_along():
    held = read_safetensors(CONFORMANCE / "lycoris-locon-norm" / "adapter_model.safetensors")
    read = lycoris.read(held)
    roles = {key: (extra.role, extra.module) for key, extra in read.extra.items()}
    assert roles == {
        "lycoris_norm.w_norm": ("diff", "lycoris_norm"),
        "lycoris_norm.b_norm": ("diff_b", "lycoris_norm"),
    }
    assert [(finding.level, finding.code) for finding in read.findings] == [("note", "bias-differences")]


def test_other_algorithms_beside_updates_are_kept_and_named():
    other = under("lora_unet_g", a1_dot_weight=drawn(4, 2), b2_dot_weight=drawn(2, 4), alpha=np.float32(1))
    read = lycoris.read(stored({**lokr(), **other, **under("lora_unet_i", weight=drawn(4), on_input=np.array(True))}))
    assert list(read) == [X]
    assert set(read.extra) == {*other, "lora_unet_i.weight", "lora_unet_i.on_input"}
    assert {extra.role for extra in read.extra.values()} == {"other"}
    unread = [finding for finding in read.findings if finding.code == "algorithm-unread"]
    assert [finding.level for finding in unread] == ["warning", "warning"]
    assert "GLoRA" in unread[0].text
    assert "(IA)³" in unread[1].text


def test_a_sparse_residual_makes_the_numbers_wrong():
    sparse = under(X, bias_indices=np.zeros((2, 3), np.int16), bias_values=drawn(3), bias_size=np.array([12, 12]))
    read = lycoris.read(stored({**lokr(), **sparse}))
    assert set(read.extra) == set(sparse)
    assert [finding.level for finding in read.findings if "sparse" in finding.text] == ["error"]


W1A, W2B = f"{X}.hada_w1_a", f"{X}.hada_w2_b"
TUCKER = under(X, lora_up_dot_weight=drawn(6, 2), lora_down_dot_weight=drawn(2, 4), lora_mid_dot_weight=drawn(2, 2, 3))
BROKEN = {
    "no w2_b": ({key: a for key, a in loha().items() if key != W2B}, FormatError, "has no hada_w2_b beside it"),
    "one core": (loha(hada_t1=drawn(2, 2, 3)), FormatError, "one of hada_t1 and hada_t2 is missing"),
    "cores": (
        {**loha(20, 20, 20), **under(X, hada_t1=drawn(20, 20, 3), hada_t2=drawn(20, 3, 20))},
        ShapeError,
        "do not fit together",
    ),
    "whole numbers": ({**loha(), W1A: np.ones((20, 2), int)}, FormatError, "int64, not floating point"),
    "w1 with a kernel": ({**lokr(), f"{X}.lokr_w1": drawn(3, 2, 3, 3)}, ShapeError, "lokr_w1 has a kernel"),
    "full and factored": (lokr(lokr_w2=drawn(4, 6)), FormatError, "both in full and in factors"),
    "two algorithms": ({**lokr(), **loha()}, FormatError, "several updates of one weight"),
    "resized Tucker": ({**TUCKER, f"{X}.lora_up.weight": drawn(6, 1)}, ShapeError, r"core \(2, 2, 3\) between"),
    "magnitude": (lokr(dora_scale=drawn(5, 1)), ShapeError, "fits neither side"),
    "alpha": (lokr(alpha=np.float32("inf")), FormatError, "alpha is inf"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_said_with_its_place(name):
    tensors, kind, message = BROKEN[name]
    with pytest.raises(kind, match=message) as caught:
        lycoris.read(stored(tensors))
    assert caught.value.where == (X,)
    assert caught.value.fix
