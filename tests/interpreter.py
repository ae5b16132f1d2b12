"""Makes Triton's interpreter (TRITON_INTERPRET=1) honest about bfloat16. For tests only.

The interpreter of triton 3.6 to 3.9 holds bfloat16 as raw bits: products of them are garbage without a word, and casts cut off where
the GPU rounds to nearest even. After `install`, casts round as torch does, dots multiply values, and arithmetic on bfloat16 that was
not cast to float32 first raises: our kernels must not do it. Python floats reach kernels as float32, as on the GPU.
"""

import numpy as np


def to_bits(x: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits, round to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded.astype(np.uint16)).reshape(np.shape(x))


def from_bits(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32).reshape(np.shape(bits))


def install() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "honest", False):
        return
    builder.honest = True
    is_bf16 = lambda x: x.dtype.scalar == tl.bfloat16
    plain = {tl.float16: np.float16, tl.float32: np.float32, tl.float64: np.float64}
    widened = lambda x: handle(from_bits(x.data), tl.float32) if is_bf16(x) else x
    cast, dot = builder.cast_impl, builder.create_dot

    def honest_cast(self, source, target):
        a, b = source.dtype.scalar, target.scalar
        if b == tl.bfloat16 and a in plain:
            return handle(to_bits(source.data.astype(np.float32)), tl.bfloat16)
        if a == tl.bfloat16 and b in plain:
            return handle(from_bits(source.data).astype(plain[b]), b)
        return cast(self, source, target)

    def refusing(name: str, operands: int) -> None:
        original = getattr(builder, name)

        def call(self, *arguments):
            if any(is_bf16(x) for x in arguments[:operands]):
                raise TypeError("bfloat16 arithmetic in a kernel: cast to tl.float32 right after the load")
            return original(self, *arguments)

        setattr(builder, name, call)

    builder.cast_impl = honest_cast
    builder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    refusing("binary_op", 2)
    refusing("unary_op", 1)
    total, convert = interpreter.ReduceOps.sum, interpreter._implicit_cvt

    def refusing_sum(self, x):
        if x.dtype.scalar == tl.bfloat16:
            raise TypeError("tl.sum of bfloat16: cast to tl.float32 first")
        return total(self, x)

    def float32_arguments(argument):
        if isinstance(argument, float):
            return tl.tensor(handle(np.array([argument], np.float32), tl.float32), tl.float32)
        return convert(argument)

    interpreter.ReduceOps.sum, interpreter._implicit_cvt = refusing_sum, float32_arguments
