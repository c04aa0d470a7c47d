"""Weights in stored forms, by the formats' own definitions, and the numbers that they mean."""

import ml_dtypes
import numpy as np

E4M3 = ml_dtypes.float8_e4m3fn


def scaled(weight, dtype, block, rng, scale_dtype=np.float32):
    """(values, scales, exact products) with a scale for every block; None is the whole axis."""
    rows, columns = (step or size for step, size in zip(block, weight.shape, strict=True))
    grid = (-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    scale = rng.uniform(0.01, 0.02, grid).astype(scale_dtype)
    exact = np.empty(weight.shape, np.float32)
    values = np.empty(weight.shape, dtype)
    for i, j in np.ndindex(weight.shape):
        factor = np.float32(scale[i // rows, j // columns])
        number = weight[i, j] / factor
        if np.dtype(dtype) == np.int8:
            number = np.clip(np.round(number), -128, 127)
        values[i, j] = number
        exact[i, j] = np.float32(values[i, j]) * factor
    return values, scale, exact


def packed(weight, group, rng, bits=4, scale_dtype=ml_dtypes.bfloat16):
    """(int32 words, scales, shape, exact products): compressed-tensors' pack-quantized."""
    rows, columns = weight.shape
    scale = rng.uniform(0.1, 0.2, (rows, -(-columns // group))).astype(scale_dtype)
    each, half = 32 // bits, 2 ** (bits - 1)
    words = np.zeros((rows, -(-columns // each)), np.uint32)
    exact = np.empty(weight.shape, np.float32)
    for i, j in np.ndindex(weight.shape):
        factor = np.float32(scale[i, j // group])
        number = int(np.clip(np.round(weight[i, j] / factor), -half, half - 1))
        words[i, j // each] |= np.uint32((number + half) << (bits * (j % each)))
        exact[i, j] = np.float32(number) * factor
    return words.view(np.int32), scale, np.array(weight.shape, np.int64), exact
