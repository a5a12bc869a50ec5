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
    made = 0
    while made < count:
        start, other = draw.randrange(len(original)), draw.randrange(len(original))
        length = draw.choice([1, 8, 64, 1000])
        before, block, after = original[:start], original[start : start + length], original[start + length :]
        flipped = bytearray(block)
        for _ in range(draw.choice([1, 5])):
            flipped[draw.randrange(len(block))] ^= 1 << draw.randrange(8)
        kind, mutant = draw.choice(
            [
                ("flip", before + bytes(flipped) + after),
                ("zero", before + bytes(len(block)) + after),
                ("overwrite", before + draw.randbytes(len(block)) + after),
                ("copy", before + original[other : other + len(block)] + after),
                ("drop", before + after),
                ("duplicate", before + block + block + after),
                ("insert", before + draw.randbytes(length) + block + after),
                ("truncate", before),
                ("shorten", original[: -draw.randint(1, 200)]),
                ("append", original + before),
                ("prepend", block + original),
            ]
        )
        if mutant != original:
            made += 1
            yield f"{kind} {start} {length} {other}", mutant


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
