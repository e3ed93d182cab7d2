"""The exact product made by torch: the same bits as NumPy's, whoever sums and in whatever order."""

import ml_dtypes
import numpy as np
import pytest

import loralens
from loralens.linalg import Device
from loralens.linalg.exact import WIDEST, DeviceProduct, exact_product, product_on
from tests.draws import draw_factors
from tests.linalg.test_device import torch_device
from tests.linalg.test_exact import graded


def same_bits(first, second):
    np.testing.assert_array_equal(first.view(np.uint32), second.view(np.uint32))


def both(terms, slices):
    here = exact_product(terms, slices=slices)
    there = product_on(torch_device(), here)
    assert isinstance(there, DeviceProduct)
    return here, there


@pytest.mark.some(9)
@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("rank", [1, 8, 16, 64, WIDEST, 2 * WIDEST + 37])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_bits_are_those_of_numpy(dtype, rank, slices):
    here, there = both([(0.37, *draw_factors(rank, 130, 301, rank, dtype))], slices)
    assert len(there.pieces) == -(-rank // WIDEST)
    same_bits(there.rows(0, 130), here.dense())
    same_bits(there.T.rows(0, 301).T.copy(), here.dense())


@pytest.mark.parametrize("slices", [1, 2])
def test_rows_do_not_depend_on_the_cut(slices):
    here, there = both([(1.0, *graded(0, 70, 50, 9, 12)), (-0.3, *graded(1, 70, 50, 4, 3))], slices)
    whole = here.dense()
    for start, stop in ((0, 1), (3, 40), (69, 70), (5, 5)):
        same_bits(there.rows(start, stop), whole[start:stop])
    out = np.full((6, 50), np.nan, np.float32)
    assert there.rows(10, 16, out=out) is out
    same_bits(out, whole[10:16])


@pytest.mark.parametrize("name", ["minilm-souravt-ckpt750", "qwen05b-peft-r8", "opt125m-bf16-r16"])
def test_real_factors(name, real):
    update = loralens.load(real / name)
    for module in list(update.modules.values())[:6]:
        for slices in (1, 2):
            here, there = both([(module.scale, module.B, module.A)], slices)
            same_bits(there.rows(0, here.shape[0]), here.dense())


def test_numpy_keeps_its_own():
    product = exact_product([(1.0, *graded(0, 5, 4, 2, 1))])
    assert product_on(None, product) is product
    assert product_on(Device(), product) is product


@pytest.mark.gpu
def test_a_gpu_has_the_same_bits():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    for rank in (8, 700):
        product = exact_product([(0.37, *graded(rank, 1000, 900, rank, 6))], slices=2)
        there = product_on(Device.of("cuda"), product)
        same_bits(there.rows(0, 1000), product.dense())
        same_bits(there.T.rows(0, 900).T.copy(), product.dense())
