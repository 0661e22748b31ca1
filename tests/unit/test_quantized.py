"""Weights in 8 bits and in several files, against naive loops and hand-worked numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor
from torch.testing import assert_close

from retro.errors import ConfigError, FormatError
from retro.quantized import FORMS, SCALE, Form, dequantize_rows, is_weights, quantize_rows, restored, shards, stored


def random_weights(seed: int = 0) -> dict[str, Tensor]:
    """Matrices and vectors of several sizes; the rows of a matrix differ much in their sizes."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for number, (rows, width) in enumerate([(400, 16), (70, 33), (160, 16), (640, 5)]):
        sizes = torch.logspace(-4, 3, rows)[:, None]
        weights[f"layer{number}.weight"] = sizes * torch.randn(rows, width, generator=generator)
        weights[f"norm{number}.weight"] = torch.randn(width, generator=generator)
    return weights


# --- 8 bits -------------------------------------------------------------------------------------------------------


def test_rows_are_rounded_as_a_naive_loop_rounds_them() -> None:
    x_OI = random_weights()["layer0.weight"]
    q_OI, scale_O = quantize_rows(x_OI)
    assert q_OI.dtype == torch.int8
    assert scale_O.dtype == torch.float32
    for row, integers, scale in zip(x_OI.double().tolist(), q_OI.tolist(), scale_O.tolist(), strict=True):
        assert scale == pytest.approx(max(abs(x) for x in row) / 127, rel=1e-6)
        assert max(abs(q) for q in integers) == 127
        for x, q in zip(row, integers, strict=True):
            # Python rounds half to even, too; next to a half, float32's division may fall to either side.
            assert q == round(x / scale) or abs(x / scale % 1 - 0.5) < 1e-4
            assert abs(q * scale - x) <= scale * (0.5 + 1e-4)


def test_a_hand_worked_row() -> None:
    q_OI, scale_O = quantize_rows(torch.tensor([[-254.0, 1.0, 3.0, 5.2, 100.0]]))
    assert scale_O.tolist() == [2.0]
    assert q_OI.tolist() == [[-127, 0, 2, 3, 50]]  # halves go to even numbers
    assert dequantize_rows(q_OI, scale_O).tolist() == [[-254.0, 0.0, 4.0, 6.0, 100.0]]


@given(st.lists(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100), min_size=1, max_size=8))
def test_no_weight_is_off_by_more_than_half_a_step(values: list[float]) -> None:
    x_1I = torch.tensor([values], dtype=torch.float32)
    q_1I, scale_1 = quantize_rows(x_1I)
    off = (dequantize_rows(q_1I, scale_1).double() - x_1I.double()).abs().max().item()
    assert off <= scale_1.item() * (0.5 + 1e-4)
    again_1I, scale_again_1 = quantize_rows(dequantize_rows(q_1I, scale_1))
    assert torch.equal(again_1I, q_1I)
    assert_close(scale_again_1, scale_1)


def test_a_row_of_zeros_stays_zero_and_a_tiny_one_stays_finite() -> None:
    x_OI = torch.tensor([[0.0, 0.0], [1e-44, -1e-45], [1.0, -1.0]])
    q_OI, scale_O = quantize_rows(x_OI)
    assert (scale_O > 0).all()
    widened_OI = dequantize_rows(q_OI, scale_O)
    assert widened_OI[0].tolist() == [0.0, 0.0]
    assert torch.isfinite(widened_OI).all()
    assert_close(widened_OI[2], x_OI[2])


# --- how weights are stored ---------------------------------------------------------------------------------------


def test_float32_comes_back_bit_for_bit() -> None:
    weights = random_weights()
    assert {name: tensor.tolist() for name, tensor in restored(stored(weights, "float32"), "x").items()} == {
        name: tensor.tolist() for name, tensor in weights.items()
    }


def to_bfloat16(x: float) -> float:
    """To 8 significant bits, half to even, by integers."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa * 256), exponent - 8)


def test_bfloat16_is_rounded_to_nearest() -> None:
    weights = random_weights()
    for name, tensor in stored(weights, "bfloat16").items():
        assert tensor.dtype == torch.bfloat16
        assert tensor.flatten().tolist() == [to_bfloat16(x) for x in weights[name].flatten().tolist()]


def test_matrices_of_modules_that_are_named_stay_in_bfloat16_beside_8_bits() -> None:
    weights = random_weights() | {"layer10.weight": torch.randn(4, 3)}
    mixed = stored(weights, "int8", bfloat16=["layer1", "layer3.weight"])
    plain, wide = stored(weights, "int8"), stored(weights, "bfloat16")
    kept = {"layer1.weight", "layer3.weight"}  # layer10 is another module; norm1 is none of these either
    assert mixed.keys() == plain.keys() - {name + SCALE for name in kept}
    for name, tensor in mixed.items():
        assert torch.equal(tensor, wide[name] if name in kept else plain[name])
    back = restored(mixed, "x")
    for name in weights:
        assert torch.equal(back[name].float(), (wide[name].float() if name in kept else restored(plain, "x")[name]))


def test_modules_that_do_not_exist_cannot_stay_in_bfloat16() -> None:
    for missing in ("layer", "norm0", "layer0.weight.more", ""):
        with pytest.raises(
            ConfigError, match=f"no matrix lies in a module '{missing}': .* layer0, layer1, layer2, layer3"
        ):
            stored(random_weights(), "int8", bfloat16=["layer0", missing])
    with pytest.raises(ConfigError, match="not float32"):
        stored(random_weights(), "float32", bfloat16=["layer0"])


def test_matrices_take_8_bits_and_vectors_stay_as_they_are() -> None:
    weights = random_weights()
    narrow = stored(weights, "int8")
    for name, tensor in weights.items():
        if tensor.ndim == 1:
            assert torch.equal(narrow[name], tensor)
            continue
        assert narrow[name].dtype == torch.int8
        assert narrow[name].shape == tensor.shape
        assert narrow[name + SCALE].shape == tensor.shape[:1]
    assert len(narrow) == 12
    back = restored(narrow, "x")
    assert list(back) == list(weights)
    for name, tensor in weights.items():
        assert back[name].dtype == torch.float32
        assert_close(back[name], tensor, rtol=0, atol=float((tensor.abs().max() / 127 / 2 * 1.001).item()))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(bad: float) -> None:
    weights = random_weights()
    weights["layer1.weight"][3, 4] = bad
    for form in FORMS:
        with pytest.raises(FormatError, match=r"layer1\.weight holds weights that are infinite or not a number"):
            stored(weights, form)


def test_8_bits_without_their_scales_are_refused() -> None:
    for change in ("missing", "short"):
        narrow = stored(random_weights(), "int8")
        scale_O = narrow.pop("layer1.weight" + SCALE)
        if change == "short":
            narrow["layer1.weight" + SCALE] = scale_O[:-1]
        with pytest.raises(FormatError, match=r"here is damaged: layer1\.weight has no _scale"):
            restored(narrow, "here")


# --- shards -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "max_bytes"), [("float32", 30_000), ("bfloat16", 16_000), ("int8", 9_000), ("int8", 100_000)]
)
def test_every_tensor_is_in_one_file_and_no_file_is_larger_than_allowed(form: Form, max_bytes: int) -> None:
    tensors = stored(random_weights(), form)
    files, index = shards(tensors, max_bytes)
    assert sorted(name for part in files.values() for name in part) == sorted(tensors)
    for part in files.values():
        assert part
        assert all(part[name] is tensors[name] for name in part)
        assert len(save(part, metadata={"format": "pt"})) <= max_bytes
    number = len(files)
    if number == 1:
        assert (list(files), index) == (["model.safetensors"], {})
    else:
        assert list(files) == [f"model-{n:05d}-of-{number:05d}.safetensors" for n in range(1, number + 1)]
        assert index["weight_map"] == {name: file for file, part in files.items() for name in part}
        assert index["metadata"] == {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())}
    assert (number == 1) == (max_bytes == 100_000)
    assert all(map(is_weights, files))


def test_without_a_limit_there_is_one_file() -> None:
    tensors = stored(random_weights(), "float32")
    files, index = shards(tensors, None)
    assert index == {}
    assert files == {"model.safetensors": tensors}


def test_a_tensor_that_no_file_may_hold_is_named_with_what_it_needs() -> None:
    tensors = {"small.weight": torch.zeros(2), "embedding.weight": torch.zeros(1 << 19)}
    message = r"at most 2,097,152 bytes cannot hold embedding\.weight, which needs 2,097,424 .* allow 2,049KiB"
    with pytest.raises(ConfigError, match=message):
        shards(tensors, 2 << 20)
    files, _ = shards(tensors, 2049 << 10)
    assert all(len(save(part, metadata={"format": "pt"})) <= 2049 << 10 for part in files.values())


def test_names_of_files_with_weights() -> None:
    ours = ["model.safetensors", "model-00002-of-00011.safetensors", "model.safetensors.index.json"]
    assert [is_weights(name) for name in ours] == [True] * 3
    others = ["optimizer.safetensors", "model-1-of-2.safetensors", "../model.safetensors", "model.safetensors.tmp"]
    assert [is_weights(name) for name in others] == [False] * 4
