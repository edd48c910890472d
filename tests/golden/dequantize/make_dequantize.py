"""Blocks of every tensor type with random bits, and their values as gguf-py 0.19.0 gives them.

TYPE.bin holds the blocks, TYPE.f32 the values, little-endian. numpy 2.4.6, seed 20240607.
Scales are finite halves of every kind: negative, subnormal, zero.

    python make_dequantize.py    # writes beside itself
"""

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

SCALE_OFFSETS = {  # bytes of a block that hold a half
    "F16": [0], "Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2],
    "Q6_K": [208],
}
VALUES = 1024


def finite_halves(rng, count):
    halves = rng.integers(0, 1 << 16, count, dtype=np.uint16)
    halves[(halves & 0x7C00) == 0x7C00] &= 0x83FF  # infinities and NaNs become subnormal
    return halves


def main():
    rng = np.random.default_rng(20240607)
    for name in ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K"]:
        kind = GGMLQuantizationType[name]
        elements, size = GGML_QUANT_SIZES[kind]
        count = VALUES // elements
        blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
        if name == "F32":
            blocks = rng.standard_normal(count).astype("<f4").view(np.uint8).reshape(count, size)
        if name == "BF16":
            halves = blocks.view("<u2")
            halves[(halves & 0x7F80) == 0x7F80] &= 0x807F
        for offset in SCALE_OFFSETS.get(name, []):
            halves = finite_halves(rng, count)
            if name in ("Q4_K", "Q5_K", "Q4_1"):  # some blocks of ordinary size
                halves[::2] = rng.uniform(0.001, 0.1, halves[::2].size).astype("<f2").view("<u2")
            blocks[:, offset : offset + 2] = halves.astype("<u2").view(np.uint8).reshape(-1, 2)
        values = quants.dequantize(blocks.reshape(-1), kind).astype("<f4")
        here = Path(__file__).parent
        (here / f"{name}.bin").write_bytes(blocks.tobytes())
        (here / f"{name}.f32").write_bytes(values.tobytes())


main()
