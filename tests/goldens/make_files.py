#!/usr/bin/env python3
"""Makes the golden safetensors and GGUF files. Needs the packages torch, numpy, safetensors and gguf.

Usage: make_files.py FOLDER     writes FOLDER/safetensors/* and FOLDER/gguf/*
"""
import argparse
import pathlib

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Value
from safetensors.torch import save_file

# Where a block keeps its half-precision scales, in bytes from its start.
SCALES = {
    Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2], Type.Q8_0: [0],
    Type.Q2_K: [80, 82], Type.Q3_K: [108], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208],
}
# Zeros, subnormal and normal ends, largest, infinity, not a number; then ordinary ones.
EXTREMES = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0x7E00, 0x2E66, 0xB123]

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2,
    torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.complex64, torch.uint64, torch.uint32, torch.uint16,
]


def make_safetensors(folder: pathlib.Path) -> None:
    # Bytes that count upwards from the tensor's number: the test rebuilds them without a generator of random numbers.
    tensors = {}
    for number, dtype in enumerate(DTYPES):
        data = (torch.arange(48) + number).to(torch.uint8)
        tensors[f"{'zyx'[number % 3]}.{number:02d}"] = data.view(dtype).reshape(2, -1)
    tensors["flags"] = torch.tensor([True, False, True])
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.empty(0, 3)
    tensors['na"me\\\n\x01\u00e9'] = torch.tensor([1.0], dtype=torch.float16)
    save_file(tensors, folder / "all_types.safetensors", {"format": "pt"})
    # One key only: the order of several is left to chance.
    save_file({"w": torch.ones(1)}, folder / "metadata.safetensors", {"k\"": "\u00e9\t"})
    save_file({"w": torch.ones(2, 2)}, folder / "plain.safetensors")
    save_file({}, folder / "empty.safetensors")


def random_blocks(kind: Type, rng: np.random.Generator) -> np.ndarray:
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (len(EXTREMES), size), dtype=np.uint8)
    for place, offset in enumerate(SCALES[kind]):
        halves = np.roll(np.array(EXTREMES, dtype=np.uint16), 5 * place)
        blocks[:, offset:offset + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(len(EXTREMES) // 2, 2 * size)


def add_metadata(writer: gguf.GGUFWriter) -> None:
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -30000)
    writer.add_uint32("u32", 4000000000)
    writer.add_int32("i32", -2000000000)
    writer.add_uint64("u64", 18000000000000000000)
    writer.add_int64("i64", -9000000000000000000)
    writer.add_float32("f32", 0.1)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("text", "gr\u00fc\u00dfe")
    writer.add_array("strings", ["a", "", "\u00e9"])
    writer.add_array("floats", [0.5, -2.0])
    writer.add_array("ints", [3, -4])
    writer.add_array("bools", [True, False])
    for name, kind, items in [("u8s", Value.UINT8, [0, 255]), ("i64s", Value.INT64, [-5, 2**62]),
                              ("u64s", Value.UINT64, [2**64 - 1]), ("f64s", Value.FLOAT64, [0.1])]:
        writer.add_key_value(name, items, Value.ARRAY, sub_type=kind)


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_gguf(folder: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(folder / "all_types.gguf", "test")
    add_metadata(writer)
    expected = {}
    for kind in SCALES:
        data = random_blocks(kind, rng)
        writer.add_tensor(kind.name, data, raw_dtype=kind)
        with np.errstate(all="ignore"):
            expected[kind.name] = torch.from_numpy(gguf.quants.dequantize(data, kind))
    for dtype in [np.float64, np.float32, np.float16, np.int8, np.int16, np.int32, np.int64]:
        data = np.arange(-6, 6).astype(dtype).reshape(2, 3, 2)
        name = np.dtype(dtype).name
        writer.add_tensor(name, data)
        expected[name] = torch.from_numpy(data)
    bfloat = torch.arange(6).to(torch.bfloat16)
    writer.add_tensor("bfloat16", bfloat.view(torch.uint8).numpy(), raw_dtype=Type.BF16)
    expected["bfloat16"] = bfloat
    unreadable = np.zeros((1, 66), dtype=np.uint8)
    writer.add_tensor("IQ2_XXS", unreadable, raw_dtype=Type.IQ2_XXS)
    write(writer)
    save_file(expected, folder / "all_types.safetensors")

    writer = gguf.GGUFWriter(folder / "tiny.gguf", "test")
    writer.add_array("names", ["ab", "c"])
    writer.add_bool("flag", True)
    writer.add_tensor("f", np.arange(3, dtype=np.float32))
    writer.add_tensor("q", np.arange(40, dtype=np.uint8).reshape(2, 20), raw_dtype=Type.Q4_1)
    write(writer)

    writer = gguf.GGUFWriter(folder / "aligned.gguf", "test")
    writer.add_custom_alignment(128)
    writer.add_tensor("a", np.arange(3, dtype=np.float32))
    writer.add_tensor("b", np.arange(4, dtype=np.float32))
    write(writer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args().folder
    for name, make in [("safetensors", make_safetensors), ("gguf", make_gguf)]:
        (folder / name).mkdir(parents=True, exist_ok=True)
        make(folder / name)


if __name__ == "__main__":
    main()
