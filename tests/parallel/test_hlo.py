"""What is read from compiled programs equals what they are known to do."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from compiled_programs import EXPECTED, EXPECTED_TPU, Expected

from xgen.parallel.hlo import HloError, Work, parse, read_work, splash
from xgen.parallel.hlo.groups import read_groups
from xgen.parallel.topology import available

SCRIPT = Path(__file__).with_name("compiled_programs.py")
Compiled = dict[str, dict[str, Any]]


def compiled(where: str) -> Compiled:
    """In a process of its own, as the number of devices is fixed when JAX starts."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_"))}
    done = subprocess.run([sys.executable, SCRIPT, where], capture_output=True, text=True, check=False, env=clean)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout[done.stdout.index("{") :]))


@pytest.fixture(scope="module")
def on_cpu() -> Compiled:
    return compiled("cpu")


@pytest.fixture(scope="module")
def on_tpu() -> Compiled:
    if not available():
        pytest.fail("needs the TPU compiler: pip install 'xgen[tpu]', or leave it out with -m \"not oracle\"")
    return compiled("v5e:2x4")


def agrees(work: Work, expected: Expected) -> None:
    assert work.flops == expected.flops
    found = {(one.kind, one.size, one.count, one.bytes) for one in work.collectives}
    assert found == set(expected.exchanges)


@pytest.mark.parametrize("name", EXPECTED)
def test_closed_forms_on_the_cpu(on_cpu: Compiled, name: str) -> None:
    agrees(read_work(on_cpu[name]["text"]), EXPECTED[name])


@pytest.mark.oracle
@pytest.mark.parametrize("name", EXPECTED_TPU)
def test_closed_forms_from_the_tpu_compiler(on_tpu: Compiled, name: str) -> None:
    agrees(read_work(on_tpu[name]["text"]), EXPECTED_TPU[name])


@pytest.mark.parametrize("name", ["convolution", "batched", "all_gather", "reduce_scatter", "all_reduce", "permute"])
def test_without_loops_the_compiler_counts_the_same_bytes(on_cpu: Compiled, name: str) -> None:
    assert read_work(on_cpu[name]["text"]).memory_bytes == on_cpu[name]["bytes"]


def test_the_compiler_counts_a_loop_once(on_cpu: Compiled) -> None:
    # Why this module is there: should it ever change, the module may go.
    assert on_cpu["scan"]["flops"] < EXPECTED["scan"].flops / 2


def test_of_stacked_weights_a_turn_reads_one_layer(on_cpu: Compiled) -> None:
    """A turn slices a layer's weights out (read, write), multiplies (both operands, result), then tanh (both ways), and
    the counter's few bytes; were the whole stack read each turn, it would be five times as much."""
    layer, stream, layers = 4 * 256 * 256, 4 * 128 * 256, 5
    work = read_work(on_cpu["scan"]["text"])
    turns = layers * (3 * layer + 4 * stream)
    assert turns <= work.memory_bytes <= turns + 6 * stream


def test_buffers_say_whether_anything_is_as_large_as(on_cpu: Compiled) -> None:
    work = read_work(on_cpu["grad"]["text"])
    stack, one_layer = 4 * 5 * 256 * 256, 4 * 256 * 256
    assert work.buffers[0].shape == "f32[5,256,256]"  # the gradient, zero at first
    assert {buffer.shape for buffer in work.at_least(stack)} == {"f32[5,256,256]"}
    assert not work.at_least(stack + 1)
    assert "f32[256,256]" in {buffer.shape for buffer in work.at_least(one_layer)}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("{}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("[4,2]<=[8]", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("[2,4]<=[4,2]T(1,0)", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['a'=4,'b'=2] {'a'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['a'=4,'b'=2] {'b'}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['a'=4,'b'=2] {'b','a'}", ((0, 2, 4, 6, 1, 3, 5, 7),)),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
    ],
)
def test_replica_groups(text: str, groups: tuple[tuple[int, ...], ...]) -> None:
    assert read_groups(text, devices=8) == groups


@pytest.mark.parametrize("text", ["[4,2]<=8", "all", "mesh['a'=8] {'c'}", "mesh['a'=8] {'a':(3)2}"])
def test_groups_not_understood_are_an_error(text: str) -> None:
    with pytest.raises(HloError, match="replica groups"):
        read_groups(text, devices=8)


def program(*lines: str, before: str = "") -> str:
    """A program of these instructions, after other computations."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule made, num_partitions=4\n\n{before}\nENTRY %main (p: f32[8,128]) -> f32[8,128] {{\n{body}\n}}\n"


P = "%p = f32[8,128]{1,0} parameter(0)"
KERNEL = 'ROOT %mha.3 = f32[8,128]{1,0} custom-call(%p), custom_call_target="tpu_custom_call"'


def test_padding_and_fast_memory() -> None:
    text = program(
        "%p = bf16[10,64]{1,0:T(8,128)(2,1)} parameter(0)",
        "%near = bf16[10,64]{1,0:T(8,128)(2,1)S(1)} copy(%p)",
        "ROOT %far = bf16[10,64]{0,1:T(8,128)(2,1)} transpose(%near), dimensions={0,1}",
    )
    work = read_work(text)
    # 10 x 64 is kept as 16 x 128, and transposed as 64 x 128; what lies in S(1) costs nothing.
    assert work.memory_bytes == 2 * 16 * 128 + 2 * 64 * 128
    assert [(buffer.name, buffer.bytes) for buffer in work.buffers] == [("far", 2 * 64 * 128)]


def test_a_kernel_s_flops_are_the_text_s_or_the_caller_s() -> None:
    told = ', backend_config={"custom_call_config":{"cost_estimate":{"flops":"77","bytes_accessed":"9"}}}'
    assert read_work(program(P, KERNEL + told)).flops_by == {"mha": 77.0}
    assert read_work(program(P, KERNEL), kernels={"mha": 5.0}).flops_by == {"mha": 5.0}
    area = read_work(program(P, KERNEL), kernels={"mha": lambda operands: 2.0 * operands[0].elements})
    assert area.flops == 2 * 8 * 128
    with pytest.raises(HloError, match=r"mha\.3.*does not tell the FLOPs of 'tpu_custom_call'.*give them by a part"):
        read_work(program(P, KERNEL))


def test_splash_attention_by_its_derivation() -> None:
    """Products of 2 x H x S x T x E, as many as each kernel computes of the square."""
    heads, length, width = 4, 1024, 128
    product = 2 * heads * length * length * width
    wide = f"bf16[{heads},{length},{width}]{{2,1,0}}"
    lines = [f"%q = {wide} parameter(0)"]
    for name in ("fwd_residuals", "dq_no_residuals", "dkv_no_residuals"):
        call = 'custom-call(%q, %q, %q), custom_call_target="tpu_custom_call"'
        lines.append(f"%splash_mha_{name}.1 = {wide} {call}")
    lines.append(f"ROOT %out = {wide} copy(%splash_mha_dkv_no_residuals.1)")
    work = read_work(program(*lines), kernels=splash({"fwd": 1.5, "dq": 2.25, "dkv": 3.0}))
    assert math.isclose(work.flops, (1.5 + 2.25 + 3.0) * product)
    with pytest.raises(HloError, match="splash_mha_dq_no_residuals"):
        read_work(program(*lines), kernels=splash({"fwd": 1.5, "dkv": 3.75}))


SLICED = """%scattered (x: f32[8,128]) -> f32[2,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %sum = f32[8,128]{1,0} all-reduce(%x), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
  %id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %mine = f32[2,128]{1,0} dynamic-slice(%sum, %id, %zero), dynamic_slice_sizes={2,128}
}

"""
ADD = """%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

"""


def test_a_sliced_all_reduce_is_a_reduce_scatter() -> None:
    text = program(P, "ROOT %part = f32[2,128]{1,0} fusion(%p), kind=kCustom, calls=%scattered", before=ADD + SLICED)
    assert read_work(text).bytes_by_kind() == {"reduce-scatter": 4 * 8 * 128}


def test_an_exchange_that_runs_beside_several_fusions_counts_once() -> None:
    gather = (
        "all-gather(%x), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}, "
        'use_global_device_ids=true, frontend_attributes={chain_id="1"}'
    )
    parts = {
        "start": '(f32[8,128]{1,0}, f32[32,128]{1,0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"',
        "middle": "f32[8,128]{1,0} negate(%x)",
        "done": 'f32[32,128]{1,0} custom-call(%x, %g), custom_call_target="AsyncCollectiveDone"',
    }
    before = "".join(
        f"%{name} (x: f32[8,128]) -> f32[1] {{\n  %x = f32[8,128]{{1,0}} parameter(0)\n"
        f"  %g = f32[32,128]{{1,0}} {gather}\n  ROOT %r = {root}\n}}\n\n"
        for name, root in parts.items()
    )
    calls = [
        f"%f_{name} = {root.split(' custom')[0].split(' neg')[0]} fusion(%p), calls=%{name}"
        for name, root in parts.items()
    ]
    work = read_work(program(P, *calls[:-1], "ROOT " + calls[-1], before=before))
    assert [(one.kind, one.count, one.bytes) for one in work.collectives] == [("all-gather", 1, 4 * 32 * 128)]


def test_pairs_of_start_and_done_count_once() -> None:
    text = program(
        P,
        "%begun = (f32[8,128]{1,0}, f32[32,128]{1,0}) all-gather-start(%p), replica_groups=[1,4]<=[4], dimensions={0}",
        "ROOT %ended = f32[32,128]{1,0} all-gather-done(%begun)",
    )
    work = read_work(text)
    assert [(one.kind, one.count, one.bytes) for one in work.collectives] == [("all-gather", 1, 4 * 32 * 128)]
    assert work.memory_bytes == 4 * (8 + 32) * 128


def test_what_is_sent_to_other_slices() -> None:
    text = program(
        P,
        "%after = token[] after-all()",
        "%sent = (f32[8,128]{1,0}, u32[], token[]) send(%p, %after), channel_id=1, is_host_transfer=true, "
        'frontend_attributes={_xla_megascale_target="{1,2}x{0:15}",_xla_megascale_transfer_type="ALL_GATHER"}',
        "ROOT %done = token[] send-done(%sent), channel_id=1",
    )
    (one,) = read_work(text).collectives
    assert (one.kind, one.between_slices, one.groups, one.bytes) == ("all-gather", True, ((1, 2),), 2 * 4 * 8 * 128)
    with pytest.raises(HloError, match="sends to where or as what"):
        read_work(text.replace("ALL_GATHER", "GOSSIP"))


def test_a_loop_whose_end_only_the_data_know(on_cpu: Compiled) -> None:
    text = on_cpu["down"]["text"].replace("constant(12)", "constant({...})").replace("known_trip_count", "unknown")
    with pytest.raises(HloError, match=r"how often it runs is not in the text.*give its count by name") as told:
        read_work(text)
    name = str(told.value).split()[0].removeprefix("%")
    for key in (name, "jit("):
        assert read_work(text, trips={key: 2.5}).flops == EXPECTED["down"].flops / 4 * 2.5


def test_counts_are_worked_out_where_the_compiler_does_not_say_them(on_cpu: Compiled) -> None:
    for name in ("scan", "nested", "fori", "down", "grad", "remat", "reduced_in_loop"):
        silent = on_cpu[name]["text"].replace("known_trip_count", "unknown")
        agrees(read_work(silent), EXPECTED[name])


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("ROOT %q = f32[8,128]{1,0} conjure(%p)", "not known here"),
        ("ROOT %q = g32[8,128]{1,0} copy(%p)", "not an array's shape"),
        ("ROOT %q = f32[8,128]{1,0:T(*,128)} copy(%p)", "join dimensions"),
        ("ROOT %q = f32[8,128]{1,0} copy(%other)", "which it does not have"),
        ("ROOT %q = f32[8,128]{1,0} copy(%p", "not closed"),
        ("ROOT %q = f32[8,128]{1,0} = copy", "no opcode"),
        ("%q = f32[8,128]{1,0} copy(%p)", "has no ROOT"),
        ("ROOT %q = f32[8,128]{1,0} dot(%p, %p), lhs_contracting_dims={1}, sparsity=L.1@2:4", "sparse"),
        ("ROOT %q = f32[8,128]{1,0} convolution(%p, %p), dim_labels=odd", "dim_labels"),
        ("ROOT %q = f32[8,128]{1,0} fusion(%p), calls=%absent", "no computation %absent"),
    ],
)
def test_what_is_not_understood_is_an_error(line: str, told: str) -> None:
    with pytest.raises(HloError, match=told):
        read_work(program(P, line))


def test_a_text_that_is_no_program_or_not_whole() -> None:
    with pytest.raises(HloError, match="it begins 'module"):
        parse("module @jit_f {}")
    whole = program(P, "ROOT %q = f32[8,128]{1,0} copy(%p)")
    with pytest.raises(HloError, match="does not end"):
        parse(whole[: whole.rindex("}")])
    with pytest.raises(HloError, match="no ENTRY"):
        parse("HloModule empty\n\n")
