"""Damages a file in many ways and has it read: a program, for a reader that crashes must not end pytest.

    python fuzz_files.py KIND FILE COUNT

Prints JSON: how many of COUNT seeded mutants of FILE were refused by the named error, how many were read with
exactly the original's content, and a line on each of the others, of which there must be none.
"""

import faulthandler
import json
import random
import resource
import sys
import warnings
from pathlib import Path

import torch

from l2l_lightning import pretrained
from l2l_lightning.training import checkpoints

SECONDS, BYTES = 20, 2**30
"""What reading one file may take; a mutated length must not allocate more."""


def mutants(original, count):
    """(what was done, the bytes) of `count` seeded mutations, none of which leaves the bytes as they are."""
    draw = random.Random(0)
    size = len(original)
    kinds = [flip, flip_many, truncate, zero, duplicate, insert, swap, overwrite, concatenate, drop]
    made = 0
    while made < count:
        kind = kinds[made % len(kinds)]
        content = bytearray(original)
        what = kind(content, draw, size)
        if content != original:
            made += 1
            yield f"{kind.__name__} {what}", bytes(content)


def flip(content, draw, size):
    at, bit = draw.randrange(size), draw.randrange(8)
    content[at] ^= 1 << bit
    return at, bit


def flip_many(content, draw, size):
    places = [draw.randrange(size) for _ in range(draw.randint(2, 50))]
    for at in places:
        content[at] ^= 1 << draw.randrange(8)
    return places


def truncate(content, draw, size):
    length = draw.choice([draw.randrange(size), size - draw.randint(1, 200)])
    del content[length:]
    return length


def block(draw, size):
    start = draw.randrange(size)
    return start, min(size, start + draw.choice([1, 8, 64, 1000]))


def zero(content, draw, size):
    start, end = block(draw, size)
    content[start:end] = bytes(end - start)
    return start, end


def duplicate(content, draw, size):
    start, end = block(draw, size)
    content[start:start] = content[start:end]
    return start, end


def insert(content, draw, size):
    start, end = block(draw, size)
    content[start:start] = draw.randbytes(end - start)
    return start, end


def overwrite(content, draw, size):
    start, end = block(draw, size)
    content[start:end] = draw.randbytes(end - start)
    return start, end


def drop(content, draw, size):
    start, end = block(draw, size)
    del content[start:end]
    return start, end


def swap(content, draw, size):
    length = draw.choice([1, 8, 64])
    a, b = (draw.randrange(size - length) for _ in range(2))
    content[a : a + length], content[b : b + length] = content[b : b + length], content[a : a + length]
    return a, b, length


def concatenate(content, draw, size):
    at = draw.choice([0, size])
    content[at:at] = content[: draw.randint(1, size)]
    return at


def same(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.requires_grad == b.requires_grad and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def read_weights(path):
    rule = pretrained.load(path)
    return {"config": rule.config(), "phi": rule.state_dict()}


READERS = {
    "checkpoint": (checkpoints.read, checkpoints.CheckpointError),
    "weights": (read_weights, pretrained.WeightsError),
}


def main(kind, file, count):
    read, error_class = READERS[kind]
    path = Path(file)
    warnings.simplefilter("ignore")
    content = path.read_bytes()
    original = read(path)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    mutant_path = path.with_name(f"mutant{path.suffix}")
    refused, identical, wrong = 0, 0, []
    for what, mutant in mutants(content, int(count)):
        mutant_path.write_bytes(mutant)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            found = read(mutant_path)
        except error_class as error:
            if mutant_path.name in str(error):
                refused += 1
            else:
                wrong.append(f"{what}: its error does not name it: {error}")
        except BaseException as error:
            wrong.append(f"{what}: {type(error).__name__}: {error}")
        else:
            if same(found, original):
                identical += 1
            else:
                wrong.append(f"{what}: read with other contents")
        finally:
            faulthandler.cancel_dump_traceback_later()
    json.dump({"refused": refused, "identical": identical, "wrong": wrong}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
