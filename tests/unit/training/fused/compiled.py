"""Run by test_kernels.py: each kernel is compiled for a GPU, down to its machine code, as far as Triton brings what it takes."""

import inspect
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nnssl_adapt.training.fused import loss_kernels, norm_kernels

HALF = {"x", "y", "residual", "gradient", "of_x", "of_residual", "logits"}
SIZES = {
    "voxels",
    "channels",
    "per_chunk",
    "chunks",
    "samples",
    "classes",
    "by_sample",
    "by_class",
    "by_voxel",
    "ignored",
}
BYTES = {"labels": "*i16", "target": "*u8"}
NUMBERS = {"eps", "slope"}


def compiled(kernel, half="*bf16", **constants):
    names = kernel.arg_names
    signature = {}
    for name in names:
        kind = (
            "i32"
            if name in SIZES
            else "fp32"
            if name in NUMBERS
            else half
            if name in HALF
            else BYTES.get(name, "*fp32")
        )
        signature[name] = "constexpr" if name in constants else kind
    if "constexprs" in inspect.signature(ASTSource.__init__).parameters:
        places = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    else:  # Triton 3.2 to 3.3
        kinds = {name: kind for name, kind in signature.items() if name not in constants}
        source = ASTSource(fn=kernel, signature=kinds, constants=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm


def norms():
    tile = {"ACC": tl.float32, "ROWS": 64, "COLUMNS": 32}
    few = {"ACC": tl.float32, "CHUNKS": 64, "COLUMNS": 16}
    yield compiled(norm_kernels._chunk_moments, **tile)
    yield compiled(norm_kernels._joined_moments, **few)
    yield compiled(norm_kernels._joined_gradients, AFFINE=True, **few)
    for flag in (True, False):
        both = {"AFFINE": flag, "RESIDUAL": flag, **tile}
        yield compiled(norm_kernels._normalised, **both)
        yield compiled(norm_kernels._chunk_gradients, **both)
        yield compiled(norm_kernels._input_gradient, **both)


def losses():
    tile = {"ROWS": 32, "COLUMNS": 128}
    yield compiled(loss_kernels._label_sums, **tile)
    yield compiled(loss_kernels._label_gradient, **tile)
    for ignore in (0, 1):
        yield compiled(loss_kernels._region_sums, IGNORE=ignore, ROWS=512, COLUMNS=4)
        yield compiled(loss_kernels._region_gradient, IGNORE=ignore, ROWS=512, COLUMNS=4)


if __name__ == "__main__":
    found = [*norms(), *losses()]
    assert all(code["ptx"] for code in found)
    sys.stdout.write(f"{len(found)} kernels compiled\n")
