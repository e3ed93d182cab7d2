"""Where arrays are worked on: NumPy in threads, torch on the CPU as it would be on a GPU, and what is refused."""

import sys
import threading

import ml_dtypes
import numpy as np
import pytest

from loralens import OptionError
from loralens.linalg import Device
from loralens.linalg.device import ROWS


def torch_device():
    torch = pytest.importorskip("torch")
    return Device("cpu", 1, torch.device("cpu"))


DEVICES = {"numpy": lambda: Device(threads=2), "torch": torch_device}


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_numbers_arrive_as_they_were(dtype):
    array = np.array([[1.5, -2.0, 0.25], [0.0, 3.5, 8.0]]).astype(dtype)
    array.flags.writeable = False
    for device in (Device(), torch_device()):
        for there in (device.put(array), device.cast(array)):
            assert str(there.dtype).removeprefix("torch.") == device.dtype
            np.testing.assert_array_equal(device.numpy(there), array.astype(np.float64))


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(2 * ROWS + 7, 40), (5, 700), (ROWS, 9000)])
def test_products_with_stored_numbers_are_those_of_float64(shape, dtype, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr("loralens.linalg.device.can_multiply_twice", lambda: False)
    rng = np.random.default_rng(0)
    W, X = rng.standard_normal(shape).astype(dtype), rng.standard_normal((17, shape[1])).astype(np.float32)
    dense, results = W.astype(np.float64), []
    for device in (Device(), Device(threads=4)):
        Y, Z = device.multiply_twice(X, W)
        assert Y.dtype == Z.dtype == np.float32
        np.testing.assert_allclose(Y, X @ dense.T, atol=3e-7 * shape[1])
        np.testing.assert_allclose(Z, Y @ dense, rtol=1e-4, atol=1e-5 * np.abs(Z).max())
        np.testing.assert_allclose(device.multiply_left(Y, W), Z, rtol=1e-4, atol=1e-5 * np.abs(Z).max())
        results.append((Y.tobytes(), Z.tobytes()))
    assert results[0] == results[1]


def test_threads_that_are_kept_serve_many_calls():
    names = set()

    def work(i):
        names.add(threading.current_thread().name)
        return i

    with Device(threads=2).keep_threads() as device:
        for _ in range(20):
            assert list(device.map(work, range(5))) == [0, 1, 2, 3, 4]
    assert len(names) <= 2
    with Device().keep_threads() as device:
        assert device == Device()


def test_an_error_in_a_thread_is_the_callers():
    def work(i):
        raise OptionError(f"{i} is wrong", fix="give another")

    with pytest.raises(OptionError, match="0 is wrong"):
        list(Device(threads=2).map(work, range(5)))


def test_a_device_is_found_by_its_name():
    assert Device.of("cpu", threads=3) == Device("cpu", 3)
    there = torch_device()
    assert Device.of(there, threads=3) is there


@pytest.mark.parametrize("name", ["tpu", "cuda:", "cuda:x", "gpu", ""])
def test_other_names_are_refused(name):
    with pytest.raises(OptionError, match="no device is called") as error:
        Device.of(name)
    assert "cuda:N" in error.value.fix


def test_without_torch_or_a_gpu_it_says_so(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match="sees no CUDA device"):
        Device.of("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(OptionError, match="no cuda:2") as error:
        Device.of("cuda:2")
    assert "cuda:1" in error.value.fix
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(OptionError, match="a GPU needs torch") as error:
        Device.of("cuda:0")
    assert "pip install 'torch>=2.4'" in error.value.fix
