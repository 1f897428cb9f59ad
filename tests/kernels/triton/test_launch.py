"""What differs between versions of jax-triton: which sets are refused, and how each is called."""

import importlib
import importlib.util
import sys
import types
from importlib import metadata

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import mlir

from .interpret import INSTALLED

pytestmark = pytest.mark.skipif(not INSTALLED, reason="triton has no wheel for this platform")

if INSTALLED:
    from paged_decode.kernels.triton import launch as library

CURE = "pip install 'paged-decode[cuda]'"


def versions(jax_version, jax_triton, triton):
    return {"jax": jax_version, "jax-triton": jax_triton, "triton": triton}


@pytest.mark.parametrize(
    "found",
    [
        versions("0.10.2", "0.3.1", "3.6.0"),
        versions("0.11.2", "0.3.1", "3.6.0"),
        versions("0.12.0.1", "0.3.1", "3.6.0"),
        versions("0.11.2", "0.4.1", "3.7.0"),
        versions("0.11.2", "0.4.1", "3.9.0"),
        versions("0.12.0", "0.4.2", "3.9.0"),
    ],
    ids=str,
)
def test_a_set_that_works_has_no_problem(found):
    assert library.problem(found) is None


@pytest.mark.parametrize(
    "found,reason",
    [
        (versions("0.11.2", "0.3.0", "3.6.0"), "jax-triton before 0.3.1 does not know this jax"),
        (versions("0.10.2", "0.2.0", "3.1.0"), "jax-triton before 0.3.1 does not know this jax"),
        (versions("0.11.2", "0.4.0", "3.6.0"), "jax-triton 0.4 needs triton 3.7"),
        (versions("0.12.0.1", "0.4.1", "3.6.0"), "jax-triton 0.4 needs triton 3.7"),
        (versions("0.12.0.1", "0.4.1", "3.9.0"), "jax-triton 0.4.1 fails under jit in jax 0.12"),
        (versions("0.13.0", "0.4.0", "3.9.0"), "jax-triton 0.4.1 fails under jit in jax 0.12"),
    ],
    ids=str,
)
def test_a_set_that_does_not_work_is_named_with_its_cure(found, reason):
    problem = library.problem(found)
    assert problem is not None and reason in problem and CURE in problem
    assert all(f"{name} {version}" in problem for name, version in found.items())


def test_what_is_not_installed_is_named_with_the_cure():
    problem = library.problem(versions("0.11.2", None, "3.6.0"))
    assert problem is not None and problem.startswith("jax-triton not installed; ")
    problem = library.problem(versions("0.11.2", None, None))
    assert problem is not None and problem.startswith("jax-triton and triton not installed; ")
    assert CURE in problem


def test_the_installed_set_is_what_is_asked_about(monkeypatch):
    monkeypatch.setattr(metadata, "version", versions("0.12.0", "0.4.1", "3.9.0").__getitem__)
    assert library.problem() == library.problem(versions("0.12.0", "0.4.1", "3.9.0"))

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert "jax and jax-triton and triton not installed" in str(library.problem())


# --- launches ---------------------------------------------------------------------------------

OUTPUTS = [jax.ShapeDtypeStruct((2, 3), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float16)]
RESULTS = [jnp.zeros(out.shape, out.dtype) for out in OUTPUTS]


@pytest.fixture
def binding(monkeypatch):
    """A jax-triton that writes down how it is called; `install(version)` says which it is."""
    seen = {}

    def triton_call(*args, **named):
        seen.update(args=args, named=named)
        return RESULTS

    def install(version, triton="3.9.0", jax_version="0.11.2"):
        found, installed = versions(jax_version, version, triton), metadata.version
        monkeypatch.setattr(metadata, "version", lambda n: found[n] if n in found else installed(n))
        module = types.ModuleType("jax_triton")
        vars(module)["triton_call"] = triton_call
        library = types.ModuleType("jax_triton.triton_lib")
        vars(library).update(
            triton_kernel_call_lib=object(),  # a jaxlib with one entry only
            triton_kernel_call_p=jax.extend.core.Primitive("triton_kernel_call"),
            triton_kernel_call_lowering=None,
        )
        monkeypatch.setitem(sys.modules, "jax_triton", module)
        monkeypatch.setitem(sys.modules, library.__name__, library)
        return seen

    return install


def launch(**changed):
    options = dict(grid=7, warps=4, stages=3, name="paged_decode", constants=dict(D=64, SPLIT=True))
    return library.launch("kernel", (np.float32(0.5),), OUTPUTS, **options | changed)


COMMON = dict(
    kernel="kernel",
    grid=(7,),
    name="paged_decode",
    num_warps=4,
    num_stages=3,
    compute_capability=None,
    D=64,
    SPLIT=True,
)


def test_jax_triton_0_3_is_told_out_shape(binding):
    seen = binding("0.3.1", triton="3.6.0")
    assert launch() is RESULTS
    assert seen["named"] == COMMON | dict(out_shape=OUTPUTS)


def test_jax_triton_0_4_is_told_out_type_and_a_version_of_ptx(binding):
    seen = binding("0.4.1")
    assert launch() is RESULTS
    assert seen["named"] == COMMON | dict(out_type=OUTPUTS, backend_options={"ptx_version": 87})


@pytest.mark.parametrize("registers", [0, 128])
def test_a_limit_of_registers_reaches_the_compiler_of_either_version(
    binding, monkeypatch, registers
):
    limited = dict(maxnreg=128) if registers else {}
    constants = dict(D=64, SPLIT=True, REGISTERS=registers)
    seen = binding("0.4.1")
    launch(constants=constants)
    assert seen["named"]["backend_options"] == dict(ptx_version=87) | limited

    binding("0.3.1", triton="3.6.0")
    library = sys.modules["jax_triton.triton_lib"]

    class Backend:
        def __init__(self, *device):
            self.device = device

        def parse_options(self, options):
            return options

    def lowering(backend, ctx, **params):
        made = backend("card", 90)
        assert made.device == ("card", 90)
        return made.parse_options(dict(num_warps=8))

    vars(library).update(get_cuda_backend=Backend, triton_kernel_call_lowering=lowering)
    registered = []
    monkeypatch.setattr(mlir, "register_lowering", lambda _, rule, **__: registered.append(rule))
    launch(constants=constants)
    params = dict(custom_call_target_name="another", **constants)
    assert registered[0]("context", **params) == dict(num_warps=8) | limited


PAGES = jnp.zeros((5, 4), jnp.bfloat16)
SAME = jax.ShapeDtypeStruct(PAGES.shape, PAGES.dtype)


def rewrite(aliases):
    options = dict(grid=7, warps=4, stages=3, name="paged_decode", constants=dict(D=64, SPLIT=True))
    named = dict(rewritten=("written",), aliases=aliases)
    return library.launch("kernel", (np.float32(0.5), PAGES), OUTPUTS, **options, **named)


def test_in_jax_triton_0_3_a_rewritten_input_is_a_last_output_with_its_own_pointer(binding):
    seen = binding("0.3.1", triton="3.6.0")
    rewrite((1,))
    want = dict(out_shape=[*OUTPUTS, SAME], input_output_aliases={1: 2})
    assert seen["named"] == COMMON | want


def test_in_jax_triton_0_4_its_pointer_does_not_exist_and_a_scalar_stands_for_it(binding):
    seen = binding("0.4.1")
    rewrite((1,))
    want = dict(out_type=[*OUTPUTS, SAME], input_output_aliases={1: 2}, written=0)
    assert seen["named"] == COMMON | want | dict(backend_options={"ptx_version": 87})


def test_an_input_that_is_not_rewritten_gets_a_byte_in_its_place(binding):
    byte = jax.ShapeDtypeStruct((1,), jnp.int8)
    seen = binding("0.3.1", triton="3.6.0")
    rewrite(())
    assert seen["named"] == COMMON | dict(out_shape=[*OUTPUTS, byte])
    seen = binding("0.4.1")
    rewrite(())
    assert seen["named"]["out_type"] == [*OUTPUTS, byte] and "written" not in seen["named"]


def test_the_card_may_be_named_and_scalars_stay_float32(binding):
    seen = binding("0.3.1", triton="3.6.0")
    launch(compute_capability=90)
    assert seen["named"]["compute_capability"] == 90
    assert [type(value) for value in seen["args"]] == [np.float32]


def test_a_set_that_works_is_no_problem_if_it_can_be_imported(binding, monkeypatch):
    binding("0.3.1", triton="3.6.0")
    assert library.problem() is None

    def no_plugin(name):
        raise ImportError("jax_triton requires JAX to be installed with GPU support")

    monkeypatch.setattr(importlib, "import_module", no_plugin)
    reason = str(library.problem())
    assert "cannot be imported: " in reason and "GPU support; install" in reason


# --- the whole way to a custom call -----------------------------------------------------------


def can_lower():
    """jax-triton 0.3.1 can be imported only beside a GPU plugin, too large for the test extra."""
    return INSTALLED and library.problem() is None


@pytest.mark.skipif(not can_lower(), reason="jax-triton with a GPU plugin is not installed")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_call_lowers_for_cuda_to_one_custom_call(monkeypatch, dtype):
    from paged_decode.kernels import dispatch, paged_attention

    from ..oracle import Case, build

    real = library.launch
    monkeypatch.setattr(dispatch, "default_platform", lambda *_: "gpu")
    monkeypatch.setattr(library, "launch", lambda *a, **k: real(*a, **k, compute_capability=90))
    inputs = build(Case((7, 16, 2), 2, 4, 64, 16, 4, dtype=dtype))
    arrays = [inputs.q, inputs.k_pages, inputs.v_pages, inputs.page_table, inputs.seq_lens]
    call = jax.jit(lambda *a: paged_attention(*a, return_lse=True, implementation="triton"))
    text = call.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call") == 1
    # The entry that XLA can put into a CUDA graph.
    assert "@triton_kernel_call_ffi" in text and "api_version = 4" in text


@pytest.mark.skipif(not can_lower(), reason="jax-triton with a GPU plugin is not installed")
def test_append_and_attend_lowers_to_one_custom_call_that_aliases_the_pages(monkeypatch):
    from paged_decode.kernels import append_and_attend, dispatch

    real = library.launch
    monkeypatch.setattr(dispatch, "default_platform", lambda *_: "gpu")
    monkeypatch.setattr(library, "launch", lambda *a, **k: real(*a, **k, compute_capability=90))
    q, new = jnp.zeros((3, 8, 64)), jnp.zeros((3, 2, 64))
    pages, table, lens = jnp.zeros((9, 2, 16, 64)), jnp.zeros((3, 4), int), jnp.zeros(3, int)
    call = jax.jit(lambda *a: append_and_attend(*a, implementation="triton"))
    traced = call.trace(pages, pages, q, new, new, table.astype(np.int32), lens.astype(np.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call") == 1 and text.count("output_operand_alias<") == 2


@pytest.mark.skipif(not INSTALLED, reason="triton has no wheel for this platform")
def test_an_amd_card_is_refused_by_name(monkeypatch):
    from paged_decode.kernels import dispatch, paged_attention
    from paged_decode.kernels.triton import call

    monkeypatch.setattr(dispatch, "default_platform", lambda *_: "gpu")
    monkeypatch.setattr(call, "compute_capability", lambda: "gfx942")
    q, pages = jnp.zeros((1, 3, 48)), jnp.zeros((3, 1, 16, 48))
    with pytest.raises(NotImplementedError, match="NVIDIA GPUs, not on gfx942"):
        paged_attention(q, pages, pages, jnp.ones((1, 1), np.int32), jnp.ones(1, np.int32),
                        implementation="triton")  # fmt: skip
