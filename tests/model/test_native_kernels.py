"""The kernels of our own against float64, and what happens where they cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from inspect import unwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xgen.model import native
from xgen.model.attention import blockwise, reference
from xgen.model.linear import dot, outer

Attend = Callable[..., jax.Array]

HERE = pytest.mark.skipif(native.library() is None, reason=f"no kernels on this machine: {native.missing()}")


F32 = jnp.dtype(jnp.float32)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(jnp.bfloat16)


def wide(array: object) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


@HERE
class TestProducts:
    @pytest.mark.parametrize("turned", [(1, 0), (1, 1), (0, 0), (0, 1)])
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_any_shape_is_float64s(self, turned: tuple[int, int], dtype: jnp.dtype) -> None:
        rng = np.random.default_rng(0)
        a_axis, b_axis = turned
        shapes = [(1, 1, 1), (1, 576, 300), (8, 33, 65), (9, 64, 32), (13, 1, 7), (250, 17, 97), (300, 1100, 40)]
        shapes += [tuple(int(2 ** rng.uniform(0, 8)) for _ in range(3)) for _ in range(25)]
        for rows, depth, columns in shapes:
            a = normal(rng, *((rows, depth) if a_axis else (depth, rows)))
            b = normal(rng, *((columns, depth) if b_axis else (depth, columns)))
            got = wide(native.multiply(jnp.asarray(a), jnp.asarray(b), a_axis, b_axis, jnp.dtype(dtype)))
            want = (wide(a) if a_axis else wide(a).T) @ (wide(b).T if b_axis else wide(b))
            # A float32 sum of `depth` products of about 1; then half a unit of bfloat16's last place.
            bound = 2e-6 * depth**0.5 + (2.0**-8 * np.abs(want) if dtype == jnp.bfloat16 else 0)
            assert (np.abs(got - want) <= bound + 1e-6).all(), (rows, depth, columns)

    def test_a_sum_goes_on_in_its_own_place(self) -> None:
        rng = np.random.default_rng(2)
        for tokens, rows, columns in [(1, 5, 7), (33, 65, 40), (600, 30, 100)]:
            x, y = (jnp.asarray(normal(rng, tokens, size)) for size in (rows, columns))
            base = jnp.asarray(rng.standard_normal((rows, columns)), jnp.float32)
            apart = native.multiply(x, y, 0, 0, jnp.dtype(jnp.float32))
            together = jax.jit(outer, donate_argnums=2)(x, y, jnp.array(base))
            assert (together == base + apart).all(), (tokens, rows, columns)

    @pytest.mark.parametrize("depth", [200, 600, 1101, 1536])
    @pytest.mark.parametrize("b_axis", [0, 1])
    def test_a_row_is_the_same_in_any_company(self, depth: int, b_axis: int) -> None:
        rng = np.random.default_rng(1)
        a, b = normal(rng, 40, depth), jnp.asarray(normal(rng, *((300, depth) if b_axis else (depth, 300))))
        whole = native.multiply(jnp.asarray(a), b, 1, b_axis, jnp.dtype(jnp.float32))
        for rows in (1, 2, 3, 5, 8, 9, 12, 31):
            part = native.multiply(jnp.asarray(a[7 : 7 + rows]), b, 1, b_axis, jnp.dtype(jnp.float32))
            assert (part == whole[7 : 7 + rows]).all(), rows

    def test_what_has_no_product_is_refused(self) -> None:
        for rows, depth in [(9, 0), (1, 0), (9, 4)]:
            with pytest.raises(jax.errors.JaxRuntimeError, match="do not belong together"):
                native.multiply(jnp.ones((rows, depth), jnp.bfloat16), jnp.ones((0, 4), jnp.bfloat16), 1, 0, F32)
        none = native.multiply(jnp.ones((0, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16), 1, 0, F32)
        assert none.shape == (0, 4)

    def test_the_model_s_product_takes_it_for_bfloat16_alone(self) -> None:
        def called(dtype: str) -> bool:
            a = jax.ShapeDtypeStruct((4, 8), jnp.dtype(dtype))
            b = jax.ShapeDtypeStruct((8, 16), jnp.dtype(dtype))
            return "xgen_multiply" in jax.jit(lambda a, b: dot(a, b, 1, 0)).lower(a, b).as_text()

        assert called("bfloat16")
        assert not called("float32")


NARROW_PAGES = [(8, 4, 1, 1, 1), (33, 16, 5, 2, 1), (64, 128, 1, 3, 3), (64, 33, 150, 1, 2), (128, 64, 70, 2, 4)]
WIDE_PAGES = [(8, 4, 1, 1, 1), (33, 17, 1, 2, 1), (64, 128, 1, 3, 3), (128, 64, 1, 2, 4), (72, 100, 1, 1, 7)]


@HERE
@pytest.mark.parametrize(
    ("kind", "cases", "bound"), [(jnp.bfloat16, NARROW_PAGES, 0.02), (np.float32, WIDE_PAGES, 2e-6)]
)
def test_attention_over_pages_is_float64s(kind: jnp.dtype, cases: list[tuple[int, ...]], bound: float) -> None:
    rng = np.random.default_rng(3)
    for size, page, columns, kv_heads, group in cases:
        start, length = rng.integers(0, 1500, 2), np.array([columns, max(columns // 2, 1)])
        reach = int((start.max() + columns) // page + 2)
        keys, values = (
            normal(rng, 2 * reach + 1, kv_heads, size, page).astype(kind),
            normal(rng, 2 * reach + 1, kv_heads, page, size).astype(kind),
        )
        table = rng.permutation(2 * reach).reshape(2, reach) + 1
        q = normal(rng, 2, columns, kv_heads * group, size).astype(kind)
        for row in range(2):  # what lies past a row's end must not matter, whatever it is
            last = int(start[row] + length[row])
            values[table[row, last // page], :, last % page :] = np.nan
            values[table[row, last // page + 1 :]] = np.nan
        got = wide(native.attend_pages(*map(jnp.asarray, (q, bits(keys), bits(values), table, start, length))))
        for row in range(2):
            key = np.concatenate([wide(keys[at]) for at in table[row]], axis=-1)
            value = np.concatenate([wide(values[at]) for at in table[row]], axis=1)
            for column in range(length[row]):
                seen = int(start[row]) + column + 1
                for head in range(kv_heads * group):
                    scores = wide(q[row, column, head]) @ key[head // group][:, :seen] / size**0.5
                    weights = np.exp(scores - scores.max())
                    want = weights / weights.sum() @ value[head // group][:seen]
                    assert np.abs(got[row, column, head] - want).max() < bound
            assert np.isfinite(got[row]).all()


@HERE
@pytest.mark.parametrize("documents", ["one", "runs", "scattered"])
def test_attention_and_its_gradients_are_the_reference_s(documents: str) -> None:
    rng = np.random.default_rng(5)
    for sequences, length, kv_heads, group, size in [
        (1, 1, 1, 1, 8),
        (2, 7, 2, 1, 33),
        (1, 129, 1, 3, 64),
        (2, 300, 2, 2, 24),
        (1, 517, 3, 1, 128),
    ]:
        heads = kv_heads * group
        q, k, v, gradient = (normal(rng, sequences, length, each, size) for each in (heads, kv_heads, kv_heads, heads))
        told = {
            "one": np.zeros((sequences, length)),
            "runs": np.cumsum(rng.random((sequences, length)) < 0.02, axis=1),
            "scattered": rng.integers(0, 3, (sequences, length)),
        }
        segments = jnp.asarray(told[documents], jnp.int32)

        def out_and_gradients(
            attend: Attend, dtype: str, *, of: tuple[np.ndarray, ...], at: jax.Array
        ) -> list[np.ndarray]:
            *operands, last = (jnp.asarray(array, dtype) for array in of)
            out, pull = jax.vjp(lambda *three: attend(*three, at), *operands)
            return [wide(leaf) for leaf in (out, *pull(last))]

        with jax.enable_x64(True):
            arrays = (q, k, v, gradient)
            got = out_and_gradients(blockwise, "bfloat16", of=arrays, at=segments)
            wanted = out_and_gradients(reference, "float64", of=arrays, at=segments)
        for ours, want in zip(got, wanted, strict=True):
            # Weights and their gradients are rounded to bfloat16 before the second products.
            assert np.abs(ours - want).max() <= 0.01 * max(np.abs(want).max(), 0.1), (length, heads, size)


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array


@HERE
def test_swiglu_and_its_gradients_are_float64s() -> None:
    rng = np.random.default_rng(4)
    gate, up, gradient = (4 * rng.standard_normal((3, 1000))).astype(jnp.bfloat16)
    gate[:6] = [0, 100, -100, 1e-6, 60, -60]
    g, u, d = map(wide, (gate, up, gradient))
    s = 1 / (1 + np.exp(-g))
    wanted = (g * s * u, d * u * s * (1 + g * (1 - s)), d * g * s)
    operands = [jnp.asarray(array) for array in (gate, up, gradient)]
    got = (native.swiglu(*operands[:2]), *native.swiglu_gradients(*operands))
    for ours, want in zip(got, wanted, strict=True):
        # Half a unit of bfloat16's last place, and float32's loss where 1 + g (1 - s) nearly cancels.
        assert (np.abs(wide(ours) - want) <= 2.0**-8 * np.abs(want) + 1e-5).all()


@HERE
class TestRows:
    """Against float64, of the same operands: half a unit of bfloat16's last place, and float32's sums."""

    @pytest.mark.parametrize("shape", [(1, 1), (3, 17), (70, 576), (2, 33, 768)])
    def test_rms_norm_and_its_gradients(self, shape: tuple[int, ...]) -> None:
        rng = np.random.default_rng(6)
        x, gradient = normal(rng, *shape), normal(rng, *shape)
        scale = rng.standard_normal(shape[-1]).astype(np.float32)
        values, above = wide(x), wide(gradient)
        root = 1 / np.sqrt((values**2).mean(axis=-1, keepdims=True) + 1e-5)
        h = above * scale
        x_wanted = root * h - values * root**3 * (h * values).mean(axis=-1, keepdims=True)
        scale_wanted = (above * values * root).reshape(-1, shape[-1]).sum(axis=0)
        operands = (jnp.asarray(x), jnp.asarray(scale))
        near(native.rms_norm(*operands, 1e-5), values * root * scale)
        x_got, scale_got = native.rms_norm_gradients(*operands, jnp.asarray(gradient), 1e-5)
        near(x_got, x_wanted)
        np.testing.assert_allclose(np.asarray(scale_got), scale_wanted, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 3, 6), (1, 70, 9, 64), (2, 3, 1, 128)])
    def test_heads_are_turned_forth_and_back(self, shape: tuple[int, ...]) -> None:
        rng = np.random.default_rng(7)
        x, turn = normal(rng, *shape), rng.uniform(0, 7, (*shape[:2], 1, shape[3] // 2))
        cosine, sine = (part.astype(np.float32) for part in (np.cos(turn), np.sin(turn)))
        for backwards in (False, True):
            first, second = np.split(wide(x), 2, axis=-1)
            s = -sine if backwards else sine
            wanted = np.concatenate([first * cosine - second * s, first * s + second * cosine], axis=-1)
            got = native.rotate(*map(jnp.asarray, (x, cosine, sine)), backwards=backwards)
            near(got, wanted, 1e-6)

    @pytest.mark.parametrize(("columns", "vocabulary"), [(1, 1), (40, 33), (16, 16), (1000, 1000), (5120, 5003)])
    @pytest.mark.parametrize("z_loss", [0.0, 1e-2])
    def test_cross_entropy_and_its_gradient(self, columns: int, vocabulary: int, z_loss: float) -> None:
        rng = np.random.default_rng(8)
        scores = (3 * rng.standard_normal((9, columns))).astype(np.float32)
        scores[0] += 300
        scores[1, 0] = 200
        scores[:, vocabulary:] = np.nan  # what padding holds does not matter
        targets, weights = rng.integers(0, vocabulary, 9), rng.random(9).astype(np.float32)
        real = scores[:, :vocabulary].astype(np.float64)
        lse = np.logaddexp.reduce(real, axis=1)
        softmax = np.zeros(scores.shape)
        softmax[:, :vocabulary] = np.exp(real - lse[:, None])
        wanted = weights[:, None] * ((1 + 2 * z_loss * lse)[:, None] * softmax - np.eye(columns)[targets])
        operands = (jnp.asarray(part) for part in (scores, targets, weights))
        nll_got, lse_got, got = native.cross_entropy(*operands, vocabulary, z_loss)
        np.testing.assert_allclose(lse_got, lse, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(nll_got, lse - real[np.arange(9), targets], rtol=1e-6, atol=2e-6)
        near(got, wanted, 1e-6)


def near(got: jax.Array, wanted: np.ndarray, slack: float = 1e-5) -> None:
    assert got.dtype == jnp.bfloat16
    assert (np.abs(wide(got) - wanted) <= 2.0**-8 * np.abs(wanted) + slack).all()


@HERE
class TestWhatIsNoNumber:
    """It stays none, whatever is beside it: the trainer's and the engine's guards look for it."""

    @pytest.mark.parametrize("place", [0, 5, 30, 69])
    def test_a_logit(self, place: int) -> None:
        scores = np.random.default_rng(0).standard_normal((3, 70)).astype(np.float32)
        scores[1, place] = np.nan
        targets, weights = jnp.asarray([1, 2, 3]), jnp.ones(3, jnp.float32)
        nll, lse, gradient = native.cross_entropy(jnp.asarray(scores), targets, weights, 70, 0.0)
        for found in (nll, lse, gradient.astype(jnp.float32).sum(1)):
            assert np.isnan(found).tolist() == [False, True, False]

    @pytest.mark.parametrize("target", [-1, 65, 69, 70, 2**31 - 1])
    def test_the_likelihood_of_a_target_that_is_none(self, target: int) -> None:
        scores = jnp.asarray(np.random.default_rng(0).standard_normal((3, 70)), jnp.float32)
        nll, lse, _ = native.cross_entropy(scores, jnp.asarray([1, target, 64]), jnp.ones(3, jnp.float32), 65, 0.0)
        assert np.isnan(nll).tolist() == [False, True, False]
        assert np.isfinite(lse).all()

    @pytest.mark.parametrize("place", [0, 3, 140])
    def test_a_key_of_a_sequence(self, place: int) -> None:
        rng = np.random.default_rng(0)
        q, k, v = (normal(rng, 1, 200, 2, 16) for _ in range(3))
        k[0, place] = np.nan
        segments = jnp.ones((1, 200), jnp.int32)
        out, lse = native.attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), segments)
        for found in (np.isnan(wide(out)).all(axis=(2, 3))[0], np.isnan(lse).all(axis=1)[0]):
            assert found.tolist() == [at >= place for at in range(200)]

    @pytest.mark.parametrize("kind", ["bfloat16", "float32"])
    @pytest.mark.parametrize("place", [0, 3, 18])
    def test_a_key_of_a_page(self, kind: str, place: int) -> None:
        rng = np.random.default_rng(0)
        q = rng.standard_normal((2, 1, 4, 16)).astype(kind)
        keys = rng.standard_normal((5, 2, 16, 8)).astype(kind)  # places last
        values = rng.standard_normal((5, 2, 8, 16)).astype(kind)
        table = np.array([[1, 2, 3], [4, 1, 0]], np.int32)
        keys[table[0, place // 8], :, :, place % 8] = np.nan
        bits = (lambda array: array.view(np.uint16)) if kind == "bfloat16" else np.asarray
        start, length = jnp.asarray([20, 3]), jnp.asarray([1, 1])
        pages = jnp.asarray(bits(keys)), jnp.asarray(bits(values))
        mixed = native.attend_pages(jnp.asarray(q), *pages, jnp.asarray(table), start, length)
        assert np.isnan(wide(mixed)).all(axis=(1, 2, 3)).tolist() == [True, False]
        assert np.isfinite(wide(mixed)[1]).all()


@HERE
def test_operands_that_do_not_belong_together_are_refused() -> None:
    """By the kernels themselves, since the annotations are looked at in tests alone."""
    x, narrow = jnp.ones((2, 4, 3, 8), jnp.bfloat16), jnp.ones((2, 4), jnp.bfloat16)
    angles, scores = jnp.ones((1, 4, 1, 4), jnp.float32), jnp.ones((4, 9), jnp.float32)
    calls: list[Callable[[], object]] = [
        lambda: unwrap(native.attend)(x, x, x, jnp.ones((1, 4), jnp.int32)),
        lambda: unwrap(native.attend)(x, x[:, :, :2], x[:, :, :2], jnp.ones((2, 4), jnp.int32)),
        lambda: unwrap(native.rotate)(x, angles, angles, False),
        lambda: unwrap(native.rms_norm)(narrow, jnp.ones(3, jnp.float32), 1e-6),
        lambda: unwrap(native.swiglu)(narrow, jnp.ones((2, 5), jnp.bfloat16)),
        lambda: unwrap(native.cross_entropy)(scores, jnp.ones(4, jnp.int32), jnp.ones(4, jnp.float32), 10, 0.0),
    ]
    for call in calls:
        with pytest.raises(jax.errors.JaxRuntimeError, match="do not belong together"):
            jax.block_until_ready(call())


@HERE
def test_any_number_of_threads_gives_the_same_bits() -> None:
    program = """
import hashlib, os, sys
os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: int(sys.argv[1])]))
import jax, jax.numpy as jnp, numpy as np
from xgen.model import native
assert native.library() is not None
rng = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
q, k, v, g = draw(2, 300, 4, 16), draw(2, 300, 2, 16), draw(2, 300, 2, 16), draw(2, 300, 4, 16)
ids = jnp.asarray(np.sort(rng.integers(0, 3, (2, 300))), jnp.int32)
out, lse = native.attend(q, k, v, ids)
found = [out, lse, *native.attend_gradients(q, k, v, ids, out, lse, g)]
a, b, scale = draw(700, 900), draw(900, 330), jnp.ones(900, jnp.float32)
found += [native.multiply(a[:rows], b, 1, 0, jnp.dtype(jnp.float32)) for rows in (1, 7, 700)]
found += native.rms_norm_gradients(a, scale, draw(700, 900), 1e-6)
print(hashlib.sha256(b"".join(np.asarray(part).tobytes() for part in found)).hexdigest())
"""
    told = {
        subprocess.run([sys.executable, "-c", program, count], capture_output=True, text=True, check=True).stdout
        for count in ("1", "2")
    }
    assert len(told) == 1


PROGRAM = """
import warnings
warnings.simplefilter("error" if {strict} else "default")
import jax.numpy as jnp
from xgen.model import native
from xgen.model.attention import blockwise, reference
from xgen.model.linear import dot
x = jnp.ones((3, 5), jnp.bfloat16)
print(float(dot(x, x, 1, 1).sum()), native.library() is None, native.missing())
"""


def run(strict: bool, **environment: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", PROGRAM.format(strict=strict)]
    return subprocess.run(program, env=os.environ | environment, capture_output=True, text=True, check=True)


def test_switched_off_products_are_xla_s() -> None:
    done = run(True, XGEN_NATIVE="off")
    assert done.stdout.strip() == "45.0 True XGEN_NATIVE is off"


def test_without_a_compiler_it_says_so_and_goes_on(tmp_path: Path) -> None:
    done = run(True, PATH=str(tmp_path), CXX="")
    assert done.stdout.startswith("45.0 True there is no C++ compiler" if native.library() else "45.0 True")


@HERE
def test_a_compiler_that_is_not_there_is_told() -> None:
    done = run(False, CXX="nowhere++ -O1")
    assert done.stdout.strip().endswith("True CXX names 'nowhere++ -O1', which is no program")
    assert "bfloat16 products are XLA's: CXX names" in done.stderr


@HERE
def test_a_compiler_may_have_options_and_off_another_spelling(tmp_path: Path) -> None:
    assert run(True, CXX="c++ -DNOTHING", XGEN_NATIVE=str(tmp_path)).stdout.startswith("45.0 False")
    assert len(list(tmp_path.iterdir())) == 1
    assert run(True, XGEN_NATIVE="OFF").stdout.strip() == "45.0 True XGEN_NATIVE is off"


@HERE
def test_a_library_that_cannot_be_loaded_is_built_again(tmp_path: Path) -> None:
    run(True, XGEN_NATIVE=str(tmp_path))
    (built,) = tmp_path.iterdir()
    whole = built.stat().st_size
    built.write_text("another system's")
    assert run(True, XGEN_NATIVE=str(tmp_path)).stdout.startswith("45.0 False")
    assert built.stat().st_size == whole


@HERE
def test_a_build_that_fails_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho the compiler is out of order >&2\nexit 1\n")
    broken.chmod(0o755)
    done = run(False, CXX=str(broken), XGEN_NATIVE=str(tmp_path / "kernels"))
    assert done.stdout.startswith("45.0 True")
    assert "the compiler is out of order" in done.stderr


@HERE
def test_it_is_built_once(tmp_path: Path) -> None:
    assert run(True, XGEN_NATIVE=str(tmp_path)).stdout.startswith("45.0 False")
    (built,) = tmp_path.iterdir()
    before = built.stat().st_mtime_ns
    run(True, XGEN_NATIVE=str(tmp_path))
    assert [path.stat().st_mtime_ns for path in tmp_path.iterdir()] == [before]
