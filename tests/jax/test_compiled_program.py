"""What benchmarks/jax_compiled.py reads in an optimised program: kernels, their bytes, what a result is made from."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from duotone.jax.weights import codec

# two kernels, one of which cuts a corner out; a copy into another memory and a move back; a loop; what costs nothing
TEXT = """
HloModule jit_step, is_scheduled=true

%fused (param_0.1: f32[1024], param_1.2: bf16[1024]) -> (f32[1024], s16[1024]) {
  %param_0.1 = f32[1024]{0} parameter(0)
  %param_1.2 = bf16[1024]{0} parameter(1)
  %zero = s16[] constant(0)
  %zeros = s16[1024]{0} broadcast(%zero), dimensions={}
  %convert = f32[1024]{0} convert(%param_1.2)
  %add = f32[1024]{0} add(%param_0.1, %convert)
  ROOT %both = (f32[1024]{0}, s16[1024]{0}) tuple(%add, %zeros)
}

%corner (param_0.7: f32[1024]) -> f32[4] {
  %param_0.7 = f32[1024]{0} parameter(0)
  ROOT %slice.1 = f32[4]{0} slice(%param_0.7), slice={[0:4]}
}

%body (carry: (s32[], f32[8])) -> (s32[], f32[8]) {
  %carry = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %of = f32[8]{0:T(128)} get-tuple-element(%carry), index=1
  %twice = f32[8]{0:T(128)} add(%of, %of)
  ROOT %next = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%at, %twice)
}

ENTRY %main (p.1: f32[1024], q.1: bf16[1024], r.1: (s32[], f32[8])) -> (f32[1024], s16[1024], f32[4], f32[1024]) {
  %p.1 = f32[1024]{0:T(1024)} parameter(0)
  %q.1 = bf16[1024]{0:T(1024)(2,1)} parameter(1)
  %r.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(2)
  %fusion.1 = (f32[1024]{0}, /*index=1*/s16[1024]{0}) fusion(%p.1, %q.1), kind=kLoop, calls=%fused, metadata={op="a(b"}
  %first = f32[1024]{0} get-tuple-element(%fusion.1), index=0
  %second = s16[1024]{0} get-tuple-element(%fusion.1), index=1
  %fusion.2 = f32[4]{0} fusion(%p.1), kind=kLoop, calls=%corner
  %copy-start.1 = (f32[1024]{0:T(1024)S(1)}, f32[1024]{0:T(1024)}, u32[]{:S(2)}) copy-start(%first)
  %copy-done.1 = f32[1024]{0:T(1024)S(1)} copy-done(%copy-start.1)
  %back = f32[1024]{0:T(1024)} copy(%copy-done.1)
  %while.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%r.1), condition=%never, body=%body
  ROOT %all = (f32[1024]{0}, s16[1024]{0}, f32[4]{0}, f32[1024]{0}) tuple(%first, %second, %fusion.2, %back)
}
"""


@pytest.fixture
def read(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from compiled_program import CompiledProgram

    return CompiledProgram


def test_kernels_and_what_they_move(read):
    program = read(TEXT)
    fusion, corner, copy_in, copy_back, in_the_loop = 4096 + 2048 + 4096 + 2048, 16 + 16, 4096, 4096, 32 + 32
    assert program.kernels() == 5
    assert program.kernels(least_bytes=4096) == 3
    assert program.bytes_moved() == fusion + corner + copy_in + copy_back + in_the_loop
    assert program.hand_written() == 0


def test_what_a_result_is_made_from(read):
    program = read(TEXT)
    assert [program.made_from(result) for result in range(4)] == [{0, 1}, set(), {0}, {0, 1}]


def test_a_tail_is_made_from_its_master_and_a_constant_is_not(read):
    def splits(master):
        weight, tail = codec.encode(master, "bfloat16")
        return weight, tail, jnp.zeros_like(tail)

    text = jax.jit(splits).lower(jax.ShapeDtypeStruct((4096,), jnp.float32)).compile().as_text()
    program = read(text)
    assert [program.made_from(result) for result in range(3)] == [{0}, {0}, set()]
    assert 4096 * 8 <= program.bytes_moved() <= 4096 * 24
