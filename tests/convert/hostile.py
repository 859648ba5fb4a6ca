#!/usr/bin/env python3
"""Files made to run code, to take memory or to confuse a reader: `personalize convert` refuses each
with exit status 1 and one line, runs nothing, and takes little memory.

usage: hostile.py PERSONALIZE MEBIBYTES    (0: memory is not looked at)
"""
import io
import os
import pathlib
import pickle
import resource
import struct
import subprocess
import sys
import tempfile
import warnings
import zipfile


class Runs:
    """Unpickling it calls a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def zipped(entries):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return out.getvalue()


def twice(entries):
    """The archive of these entries with each of them once more."""
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as archive:
        warnings.simplefilter("ignore")
        for name, data in [*entries.items(), *entries.items()]:
            archive.writestr(name, data)
    return out.getvalue()


def bomb():
    """An array of 200 MB of zeros; never whole in this process, whose memory a child begins with."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("t.npy", "w") as entry:
            entry.write(npy(array((50_000_000,))))
            for _ in range(200):
                entry.write(bytes(1_000_000))
    return out.getvalue()


def torch_zip(data):
    return zipped({"m/data.pkl": data, "m/version": b"3\n", "m/data/0": bytes(64)})


def torch_old(data):
    magic = pickle.dumps(0x1950a86a20f9469cfc6c, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    return magic + data + pickle.dumps([], 2)


def safetensors(header, data=b"", length=None):
    text = header.encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape, offsets, dtype="F32"):
    return f'{{"t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}'


def npy(header, data=b""):
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def array(shape, descr="<f4"):
    return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"


def field(number, content):
    """A field of a protocol buffer: an integer, or bytes."""
    def varint(value):
        out = b""
        while value > 127:
            out += bytes([value & 127 | 128])
            value >>= 7
        return out + bytes([value])
    if isinstance(content, int):
        return varint(number << 3) + varint(content % 2 ** 64)
    return varint(number << 3 | 2) + varint(len(content)) + content


def onnx(*tensor_fields):
    return field(1, 8) + field(7, field(5, b"".join(tensor_fields)))


def rebuilt(offset, size, stride, elements=16):
    """A state dictionary {"t": tensor} by PyTorch's own functions."""
    def packed(values):
        return b"(" + b"".join(pickle.dumps(v, 2)[2:-1] for v in values) + b"t"
    storage = (b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00"
               b"cpu" + pickle.dumps(elements, 2)[2:-1] + b"tQ")
    return (b"\x80\x02}X\x01\x00\x00\x00tctorch._utils\n_rebuild_tensor_v2\n(" + storage +
            pickle.dumps(offset, 2)[2:-1] + packed(size) + packed(stride) +
            b"\x89}tRs.")


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    work = tempfile.TemporaryDirectory()
    root = pathlib.Path(work.name)
    marker = root / "marker"
    (root / "items.csv").write_text("ITEM_ID\na\nb\nc\nd\n")
    golden = pathlib.Path(__file__).resolve().parent.parent / "golden" / "convert"

    def convert(path):
        return subprocess.run(
            [sys.argv[1], "convert", "--from", path, "--items", root / "items.csv", "-o",
             root / "out.pzm"], capture_output=True, text=True, cwd=root)

    for good in ["model.safetensors", "model.npz", "model.pt", "model_old.pt", "model.onnx"]:
        done = convert(golden / good)
        assert done.returncode == 0, done
    (root / "out.pzm").unlink()

    touch = pickle.dumps({"weight": Runs(os.system, f"touch {marker}")}, 2)
    evaluate = pickle.dumps({"weight": Runs(eval, f"open('{marker}','w')")}, 4)
    # A list of 100,000 values, copied again and again by five bytes each.
    copies = (b"\x80\x02}(X\x01\x00\x00\x00a(" + b"K\x01" * 100_000 + b"tq\x01" +
              b"".join(b"K%cctorch\nSize\nh\x01\x85R" % (i % 256) for i in range(100_000)) + b"u.")
    nested = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    weights = (golden / "model.npz").read_bytes()
    cases = {
        "a pickle that calls os.system": (torch_zip(touch), "system, which could run code"),
        "the same in the older format": (torch_old(touch), "system, which could run code"),
        "a pickle that calls eval": (torch_zip(evaluate), "eval, which could run code"),
        "a pickle alone": (touch, "not a file of torch.save|could run code"),
        "a pickle that copies a list": (torch_zip(copies), "holds too many values"),
        "a pickle nested deeply": (torch_zip(nested), "nested too deeply|not a known"),
        "a pickle cut off": (torch_zip(touch[:20]), "ends too early"),
        "a storage that is not there": (torch_zip(rebuilt(0, (4,), (1,)).replace(
            b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009")), "has no storage in the file"),
        "a tensor behind its storage": (torch_zip(rebuilt(2 ** 62, (4,), (1,))), "outside|more b"),
        "a tensor larger than its storage": (torch_zip(rebuilt(0, (2 ** 31, 2 ** 31), (1, 1))),
                                             "overflows|more bytes"),
        "negative sizes": (torch_zip(rebuilt(0, (-4,), (1,))), "negative size"),
        "strides that overflow": (torch_zip(rebuilt(0, (4, 4), (2 ** 62, 2 ** 62))), "strides"),
        "a header of 2^63 bytes": (safetensors("{}", length=2 ** 63), "longer than the file"),
        "a header that is not JSON": (safetensors("{[[[["), "not JSON"),
        "a shape that overflows": (safetensors(tensor([2 ** 40, 2 ** 40], [0, 0])), "overflows"),
        "a negative shape": (safetensors(tensor([-1, 2], [0, 8]), bytes(8)), "natural number"),
        "two tensors of one name": (safetensors(
            '{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            '"t":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', bytes(8)), '"t" twice'),
        "a header that nests": (safetensors('{"t":' + "[" * 100_000 + "]" * 100_000 + "}"),
                                "nests deeper"),
        "offsets outside the file": (safetensors(tensor([2], [0, 2 ** 50]), bytes(8)), "outside"),
        "a shape larger than its bytes": (safetensors(tensor([2 ** 30], [0, 8]), bytes(8)), "bytes"),
        "a NaN": (safetensors('{"user.weight":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},'
                              '"item.weight":{"dtype":"F32","shape":[4,2],"data_offsets":[0,32]}}',
                              b"\xff" * 32), "not finite"),
        "an array of objects": (npy(array((1,), "|O"), evaluate), "Python objects"),
        "an array of 10^18 values": (npy(array((10 ** 9, 10 ** 9))), "more bytes"),
        "an array whose shape overflows": (npy(array((2 ** 40, 2 ** 40))), "overflows"),
        "an array of negative shape": (npy(array((-5,))), "natural number"),
        "an array header cut off": (npy(array((5,)))[:30], "longer than the file"),
        "a zip archive cut off": (weights[:-40], "not a whole zip archive"),
        "a zip archive with a hole": (weights[:200] + weights[260:], "zip archive"),
        "a zip archive changed": (weights[:200] + b"\x55\xaa" + weights[202:], "damaged|header"),
        "two arrays of one name": (twice({"t.npy": npy(array((1,)), bytes(4))}), "same name"),
        "a decompression bomb": (bomb(), "decompresses to 200000"),
        "ONNX weights in another file": (onnx(field(1, 4), field(2, 1), field(8, b"w"), field(
            13, field(1, b"location") + field(2, b"/etc/passwd")), field(14, 1)), "another file"),
        "a negative ONNX dimension": (onnx(field(1, -4), field(2, 1), field(8, b"w"),
                                           field(9, bytes(16))), "negative dimension"),
        "an ONNX tensor larger than the file": (onnx(
            field(1, 2 ** 40), field(2, 1), field(8, b"w"), field(9, bytes(16))), "more bytes"),
        "an ONNX graph cut off": ((golden / "model.onnx").read_bytes()[:-50], "damaged or cut off"),
        "nothing": (b"", "is empty; copy it again"),
        "a text": (b"hello world, this is no model", "a text that begins 'hello world"),
        "bytes of no format": (bytes(range(1, 60)), "none of the known formats"),
    }
    for name, (data, pattern) in cases.items():
        path = root / "hostile"
        path.write_bytes(data)
        check(name, convert(path), pattern, root)
    # As large as they say, but of holes.
    for name, begin, size, pattern in [
            ("a safetensors header of 1 GB", struct.pack("<Q", 10 ** 9) + b"{", 3 * 10 ** 9, "over"),
            ("an ONNX file of 3 GB", onnx(field(8, b"w")), 3 * 10 ** 9, "2 GiB"),
            ("a pickle of 1 GB", torch_old(b"\x80\x02X" + struct.pack("<I", 10 ** 9)), 2 * 10 ** 9,
             "too long")]:
        path = root / "hostile"
        with open(path, "wb") as file:
            file.write(begin)
            file.truncate(size)
        check(name, convert(path), pattern, root)
    assert not marker.exists(), "code in a pickle was run"
    taken = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
    print(f"{len(cases) + 3} files refused, at most {taken} MiB taken")
    assert int(sys.argv[2]) == 0 or taken < int(sys.argv[2]), taken


def check(name, done, pattern, root):
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and len(lines) == 1 and not done.stdout, (name, done)
    assert any(part in lines[0] for part in pattern.split("|")), (name, lines[0])
    assert not (root / "out.pzm").exists(), name
    print(f"{name}: {lines[0][:160]}")


main()
