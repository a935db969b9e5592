"""Choice of a back end, and kernels as differentiable operators, on a small op written here."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import threading
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import fastdiff_kernels
from fastdiff_kernels import _launch, _native, _register, backend, explain, group_norm_silu

# --- kernel(): a softplus with a per-channel weight, forward and backward in Python ---

differentiated: list[list[bool]] = []


def fill(results, x, weight, bias, beta):
    y, slope = results
    torch.sigmoid(x * beta, out=slope)
    torch.mul(F.softplus(x * beta) / beta, weight, out=y)
    if bias is not None:
        y += bias


def fill_gradients(gradients, dy, x, weight, bias, slope, beta):
    dx, dweight, dbias = gradients
    differentiated.append([gradient is not None for gradient in gradients])
    if dx is not None:
        torch.mul(dy * slope, weight, out=dx)
    if dweight is not None:
        torch.sum((dy * F.softplus(x * beta) / beta).flatten(0, -2), 0, out=dweight)
    if dbias is not None:
        torch.sum(dy.flatten(0, -2), 0, out=dbias)


softplus = _register.kernel(
    "test_softplus(Tensor x, Tensor weight, Tensor? bias, float beta) -> (Tensor y, Tensor slope)",
    empty=lambda x, weight, bias, beta: (torch.empty_like(x), torch.empty_like(x)),
    forward=fill,
    backward=fill_gradients,
    saves=("x", "weight", "bias", "slope"),
)

# Two results, a backward that reads neither argument, and gradients shaped like a saved result.
halves = _register.kernel(
    "test_halves(Tensor x) -> (Tensor up, Tensor down)",
    empty=lambda x: (torch.empty_like(x), torch.empty_like(x)),
    forward=lambda results, x: (torch.exp(x, out=results[0]), torch.exp(-x, out=results[1])),
    backward=lambda gradients, dup, ddown, up: torch.add(
        0 if dup is None else dup * up, 0 if ddown is None else -ddown / up, out=gradients[0]
    ),
    saves=("up",),
    grad_like={"x": "up"},
    returned=2,
)


filled: list[list[bool]] = []


def fill_terms(gradients, dy, x, scale):
    filled.append([gradient is not None for gradient in gradients])
    if gradients[0] is not None:
        gradients[0].copy_(dy * scale)
    if gradients[2] is not None:
        torch.sum(dy * x, dtype=dy.dtype, dim=None, out=gradients[2])


# (x + shift) * scale: the two terms of the sum have one gradient, that of x.
shifted = _register.kernel(
    "test_shifted(Tensor x, Tensor shift, Tensor scale) -> (Tensor y, Tensor sum)",
    empty=lambda x, shift, scale: (torch.empty_like(x), torch.empty_like(x)),
    forward=lambda results, x, shift, scale: results[0].copy_(results[1].copy_(x + shift) * scale),
    backward=lambda gradients, dy, total, scale: fill_terms(gradients, dy, total, scale),
    saves=("sum", "scale"),
    grad_like={"x": "sum"},
    grad_same={"shift": "x"},
)


def softplus_oracle(x, weight, bias, beta) -> Tensor:
    y = F.softplus(x * beta) / beta * weight
    return y if bias is None else y + bias


def make(*shape, dtype=torch.float32) -> list[Tensor]:
    shapes = [shape, shape[-1:], shape[-1:]]
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def test_kernel_values_and_gradients():
    inputs = make(3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(softplus(*inputs, 2.0), softplus_oracle(*inputs, 2.0))
    assert torch.autograd.gradcheck(lambda *inputs: softplus(*inputs, 2.0), inputs)
    assert torch.autograd.gradcheck(lambda *inputs: softplus(*inputs, None, 2.0), inputs[:2])
    with torch.no_grad():
        torch.testing.assert_close(softplus(*inputs, 2.0), softplus_oracle(*inputs, 2.0))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_kernel_opcheck(with_bias, channels_last):
    x, weight, bias = make(2, 4, 3, 5)
    if channels_last:
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    operator = torch.ops.fastdiff.test_softplus.default
    torch.library.opcheck(operator, (x, weight, bias if with_bias else None, 2.0))
    dy, slope = torch.randn_like(x).detach(), torch.rand_like(x).detach()
    saved = (x.detach(), weight.detach(), None, slope)
    operator = torch.ops.fastdiff.test_softplus_backward.default
    torch.library.opcheck(operator, (dy, *saved, 2.0, [True, False, False]))


@pytest.mark.parametrize("compiled", [False, True])
def test_kernel_does_no_work_for_what_needs_no_gradient(compiled):
    def call(x, weight, bias):
        return softplus(x, weight, bias, 2.0)

    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    for needs in ([True, False, True], [False, True, False], [True, True, True]):
        inputs = [t.requires_grad_(n) for t, n in zip(make(3, 4), needs, strict=True)]
        y = call(*inputs)
        differentiated.clear()
        y.sum().backward()
        assert differentiated == [needs]
        assert [t.grad is not None for t in inputs] == needs
    assert not call(*(t.detach() for t in inputs)).requires_grad


def test_kernel_saves_only_what_it_says():
    """The argument that backward does not read is free once the caller drops it."""
    middle = make(64)[0] * 1
    alive = weakref.ref(middle)
    up, down = halves(middle)
    del middle
    gc.collect()
    assert alive() is None
    (up.sum() + down.sum()).backward()


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3))[1:])
def test_terms_of_a_sum_share_one_gradient(needs):
    inputs = [torch.randn(4, 3), torch.randn(4, 3), torch.randn(())]
    for tensor, need in zip(inputs, needs, strict=True):
        tensor.requires_grad_(need)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    filled.clear()
    got = torch.autograd.grad(shifted(*inputs).square().sum(), wanted)
    x, shift, scale = inputs
    torch.testing.assert_close(
        got, torch.autograd.grad(((x + shift) * scale).square().sum(), wanted)
    )
    assert filled == [[needs[0] or needs[1], False, needs[2]]]  # one tensor is filled for both


def test_launches_are_recorded_where_a_chip_is_pretended():
    x = torch.empty(2, 64, 8, 8, device="meta")
    weight, bias = torch.empty(64, device="meta"), torch.empty(64, device="meta")
    with pytest.raises(RuntimeError, match="runs on cuda tensors"), backend("triton"):
        group_norm_silu(x, weight, bias, num_groups=8)
    chip = _launch.pretend(_launch.CHIPS["sm_90"])
    with chip, _launch.recording() as launches, backend("triton"):
        y = group_norm_silu(x, weight, bias, num_groups=8)
    assert y.shape == x.shape
    assert y.device.type == "meta"
    assert all(launch.kernel.fn.__name__.startswith("group_norm_silu_") for launch in launches)
    assert len(launches) >= 1


def test_kernel_with_two_results(check_compiled, differentiate):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(halves, [x])
    (only_up,) = torch.autograd.grad(halves(x)[0].sum(), x)  # the other's gradient is None
    torch.testing.assert_close(only_up, x.exp())
    check_compiled(halves, lambda B: [torch.randn(B, 4)], batched=1)


def test_kernel_compiles_to_one_graph(check_compiled):
    check_compiled(
        lambda x, weight, bias: softplus(x * 2, weight, bias, 2.0) + 1,
        lambda B: [torch.randn(B, 4), torch.randn(4), torch.randn(4)],
        batched=1,
    )


@pytest.mark.parametrize("form", ["contiguous", "channels_last", "sliced", "expanded"])
def test_kernel_keeps_the_promised_memory_format(form):
    torch._dynamo.reset()
    x = {
        "contiguous": torch.randn(2, 4, 3, 5),
        "channels_last": torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last),
        "sliced": torch.randn(2, 4, 3, 10)[..., ::2],
        "expanded": torch.randn(1, 4, 3, 5).expand(2, 4, 3, 5),
    }[form].requires_grad_()
    weight = torch.randn(5)
    eager = softplus(x, weight, None, 2.0)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x), mode.from_tensor(weight)]
        fake = softplus(*fakes, None, 2.0)  # runs no kernel: there is no data to run it on
    compiled = torch.compile(softplus, fullgraph=True, backend="aot_eager")(x, weight, None, 2.0)
    assert eager.stride() == fake.stride() == compiled.stride()
    gradients = [torch.autograd.grad(y, x, torch.ones_like(y))[0] for y in (eager, compiled)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].stride() == torch.empty_like(x).stride()


def test_kernel_refuses_double_backward():
    x, weight, bias = make(3, 4)
    (dx,) = torch.autograd.grad(softplus(x, weight, bias, 2.0).sum(), x, create_graph=True)
    message = "test_softplus: double backward is not implemented; .*'reference'"
    with pytest.raises(RuntimeError, match=message):
        dx.sum().backward()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_kernel_in_inductor():
    torch._dynamo.reset()
    inputs = make(3, 4)
    compiled = torch.compile(lambda *a: softplus(a[0] * 2, *a[1:], 2.0) * 3, fullgraph=True)
    got = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    y = softplus_oracle(inputs[0] * 2, *inputs[1:], 2.0) * 3
    for a, b in zip(got, torch.autograd.grad(y.square().sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("schema", "options", "message"),
    [
        ("bad(Tensor x) -> Tensor", {}, "kernel: schema 'bad.*; expected 'name"),
        ("bad(Tensor x, float eps=1e-5) -> (Tensor y)", {}, "neither defaults nor"),
        (
            "bad(Tensor x) -> (Tensor y)",
            {"saves": ("z",)},
            r"bad saves \['z'\], which are no",
        ),
        ("bad(Tensor x) -> (Tensor y)", {"saves": ()}, "bad does not save 'x', the model of x's"),
    ],
)
def test_kernel_bad_registration(schema, options, message):
    functions = {"empty": torch.empty_like, "forward": fill, "backward": fill_gradients}
    with pytest.raises(ValueError, match=message):
        _register.kernel(schema, **(functions | {"saves": ("x",)} | options))


# --- backend(), explain() and Op ---


@pytest.fixture
def op(monkeypatch):
    """An op whose reference doubles; tests add back ends that triple."""
    monkeypatch.setattr(_register, "_OPS", dict(_register._OPS))
    _register._absences.clear()
    monkeypatch.setattr(_native, "why_absent", lambda: None)
    torch._dynamo.reset()
    yield _register.Op("test_times", lambda x: (x,), lambda x: x * 2)
    _register._absences.clear()
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def auto_afterwards():
    yield
    backend("auto")
    assert _register._entered == []


def test_backend_sets_for_good_or_for_a_block():
    assert _register._asked == "auto"
    backend("reference")
    assert _register._asked == "reference"
    with backend("triton") as inner:
        assert _register._asked == inner.name == "triton"
        with backend("native"):
            assert _register._asked == "native"
        assert _register._asked == "triton"
    assert _register._asked == "reference"
    kept = backend("native")
    backend("auto")
    with kept:  # entered late: it takes back nothing that was set since
        assert _register._asked == "native"
    assert _register._asked == "auto"
    with pytest.raises(KeyError), backend("reference"):
        raise KeyError
    assert _register._asked == "auto"


def test_backend_blocks_of_threads_may_interleave():
    entered, left = threading.Event(), threading.Event()

    def other():
        with backend("triton"):
            entered.set()
            assert left.wait(10)

    thread = threading.Thread(target=other)
    with backend("reference"):
        thread.start()
        assert entered.wait(10)
        assert _register._asked == "triton"
    assert _register._asked == "triton"  # still in the other's block
    left.set()
    thread.join()
    assert _register._asked == "auto"


@pytest.mark.parametrize("name", ["cuda", "", "Reference"])
def test_backend_unknown_name(name):
    with pytest.raises(ValueError, match=f"backend: unknown back end '{name}'; expected one of"):
        backend(name)
    assert _register._asked == "auto"


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_environment_variable():
    code = "import fastdiff_kernels._register as r; print(r._asked)"
    assert run_python(code, FASTDIFF_BACKEND="reference").stdout == "reference\n"
    assert run_python(code, FASTDIFF_BACKEND="").stdout == "auto\n"
    failed = run_python(code, FASTDIFF_BACKEND="gpu")
    assert "ValueError: FASTDIFF_BACKEND: unknown back end 'gpu'; expected one of" in failed.stderr


def test_import_is_light():
    code = "import sys, torch; before = set(sys.modules); import fastdiff_kernels;"
    code += "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    added = run_python(code).stdout
    heavy = ("triton", "transformers", "deepspeed", "diffusers", "numpy", "torch._dynamo")
    assert not [name for name in heavy if f"'{name}'" in added], added


def test_asked_for_back_end_that_is_absent_raises():
    x, ones = torch.randn(1, 4, 2, 2), torch.ones(4)
    message = "group_norm_silu: back end 'triton' was asked for and cannot run this call: "
    with backend("triton"), pytest.raises(RuntimeError, match=message):
        group_norm_silu(x, ones, ones, num_groups=2)


IMAGE, TOKENS, C = torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 4), torch.ones(4)
CALLS = {
    "window_attention": ((torch.zeros(1, 4, 4, 12), None), {"heads": 2, "window_size": 2}),
    "dwconv_gelu": ((TOKENS, torch.zeros(4, 1, 3, 3), C), {"grid": (2, 2)}),
    "dwconv_ffn": (
        (TOKENS, torch.eye(4), C, torch.zeros(4, 1, 3, 3), C, torch.eye(4), C),
        {"grid": (2, 2)},
    ),
    "group_norm_silu": ((IMAGE, C, C), {"num_groups": 2}),
    "layer_norm_modulate": ((TOKENS,), {}),
    "philox_bits": ((torch.zeros(2, dtype=torch.int64), 0, (3,)), {}),
    "philox_normal": ((torch.zeros(2, dtype=torch.int64), 0, (3,)), {}),
}


@pytest.mark.parametrize("name", sorted(_register._OPS))
def test_every_op_explains_itself(name):
    public = getattr(fastdiff_kernels, name)
    args, kwargs = CALLS[name]
    told = explain(public, *args, **kwargs)
    assert told == explain(name, *args, **kwargs)
    assert (told.op, told.asked) == (name, "auto")
    assert told.backend in ("reference", "native")
    assert set(told.reasons) == {"reference", "native", "triton"} - {told.backend}
    assert all(told.reasons.values())
    assert str(told).startswith(f"{name} takes {told.backend} (asked for: auto)\n  not triton: ")
    with pytest.raises(TypeError, match=f"^{name}: .* expected a tensor"):
        explain(public, 1, *args[1:], **kwargs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
@pytest.mark.parametrize("name", sorted(n for n in _register._OPS if not n.startswith("philox")))
def test_every_op_in_inductor(name, differentiate):
    torch._dynamo.reset()
    args, kwargs = CALLS[name]
    tensors = [torch.randn(t.shape, requires_grad=True) for t in args if t is not None]

    def call(*tensors):
        return getattr(fastdiff_kernels, name)(*tensors, *args[len(tensors) :], **kwargs)

    got = differentiate(torch.compile(call, fullgraph=True), tensors)
    for a, b in zip(got, differentiate(call, tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_explain_unknown_op():
    with pytest.raises(ValueError, match="explain: unknown op 'conv2d'; expected one of"):
        explain("conv2d")


def test_auto_takes_native_on_cpu_where_it_supports_the_call(op):
    x = torch.ones(3)
    assert explain("test_times", x).reasons["native"].startswith("not built in this version")
    assert op(x)[0] == 2
    op.add("native", lambda x: x * 3, lambda x: "x is long" if len(x) > 3 else None)
    told = explain("test_times", x)
    assert (told.backend, told.reasons["reference"]) == ("native", "native comes first")
    assert op(x)[0] == 3
    told = explain("test_times", torch.ones(4))
    assert (told.backend, told.reasons["native"]) == ("reference", "x is long")
    assert op(torch.ones(4))[0] == 2
    with backend("native"), pytest.raises(RuntimeError, match="cannot run this call: x is long"):
        op(torch.ones(4))
    with backend("reference"):
        assert op(x)[0] == 2
        assert explain("test_times", x).reasons["native"] == "reference was asked for"
    assert op(x.to("meta")).device.type == "meta"
    assert "these are on meta" in explain("test_times", x.to("meta")).reasons["native"]


def test_absent_library_is_named_with_its_cure(op, monkeypatch):
    monkeypatch.setattr(_native, "why_absent", lambda: "no compiler was found; install gcc")
    op.add("native", lambda x: x * 3)
    x = torch.ones(3)
    assert op(x)[0] == 2
    assert explain("test_times", x).reasons["native"] == "no compiler was found; install gcc"
    with backend("native"):
        assert explain("test_times", x).backend is None
        assert str(explain("test_times", x)).startswith("test_times raises (asked for: native)")
        with pytest.raises(RuntimeError, match="no compiler was found; install gcc"):
            op(x)


def test_triton_takes_cpu_tensors_only_when_it_interprets_and_is_asked_for(op, monkeypatch):
    op.add("triton", lambda x: x * 5)
    x = torch.ones(3)
    told = explain("test_times", x)
    assert "on cuda tensors, and these are on cpu; TRITON_INTERPRET=1" in told.reasons["triton"]
    monkeypatch.setattr(_register, "_INTERPRETS", True)
    monkeypatch.setattr(_register.importlib.util, "find_spec", lambda name: None)
    assert op(x)[0] == 2  # auto
    with backend("triton"), pytest.raises(RuntimeError, match="pip install triton"):
        op(x)
    _register._absences.clear()
    monkeypatch.setattr(_register.importlib.util, "find_spec", lambda name: object())
    with backend("triton"):
        assert op(x)[0] == 5


@pytest.mark.parametrize("compiled", [False, True])
def test_module_of_a_back_end_is_imported_when_first_asked_for(op, compiled, monkeypatch):
    """By its name, from a finder that counts: nothing is imported before the call needs it."""
    imported = []

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name != "test_times_kernels":
                return None
            return importlib_machinery_spec(name, imported)

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    op.add("native", "test_times_kernels")
    call = torch.compile(op, fullgraph=True, backend="eager") if compiled else op
    with backend("reference"):
        assert call(torch.ones(3))[0] == 2
    assert imported == []
    assert call(torch.ones(3))[0] == 3
    assert call(torch.ones(4))[0] == 2  # its `supports` declines
    assert imported == ["test_times_kernels"]
    del sys.modules["test_times_kernels"]


def importlib_machinery_spec(name, imported):
    class Loader:
        @staticmethod
        def create_module(spec):
            return types.ModuleType(name)

        @staticmethod
        def exec_module(module):
            imported.append(name)
            module.call = lambda x: x * 3
            module.supports = lambda x: "x is long" if len(x) > 3 else None

    return _register.importlib.machinery.ModuleSpec(name, Loader)


def test_bad_back_end_name_of_an_op(op):
    with pytest.raises(ValueError, match=r"Op.add: back end 'cuda'; expected one of"):
        op.add("cuda", lambda x: x)


def test_compiled_function_follows_a_change_of_back_end(op):
    op.add("native", lambda x: x * 3)
    counter = CompileCounterWithBackend("eager")
    call = torch.compile(lambda x: op(x) + 1, fullgraph=True, backend=counter)
    x = torch.ones(3)
    assert call(x)[0] == 4
    with backend("reference"):
        assert call(x)[0] == 3
        assert call(x)[0] == 3
    assert call(x)[0] == 4
    backend("reference")
    assert call(x)[0] == 3
    assert counter.frame_count == 2  # each choice once; going back and forth recompiles nothing
