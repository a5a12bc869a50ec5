"""What W&B and TensorBoard were told, read from the files that they leave."""

import json
import struct
import time
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event
from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32768, 7
"""Of the log format of LevelDB, which W&B's file has after a header of as many bytes."""


def wandb_records(path):
    """The records of a run-ID.wandb, which another process may still be writing to."""
    for _ in range(300):
        records = list(_records(Path(path).read_bytes()))
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.1)
    raise TimeoutError(f"{path} has no end")


def _records(content):
    place, whole = HEADER, b""
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:  # what is left of a block
            place += BLOCK - place % BLOCK
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + HEADER])
        whole += content[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4) and place <= len(content):  # the whole of a record, or its last part
            yield Record.FromString(whole)
            whole = b""


def wandb_run(folder):
    """The record of the one W&B run in a folder, its config and summary, and the names in its history."""
    (path,) = Path(folder).glob("wandb/offline-run-*/run-*.wandb")
    run, config, summary, history = None, {}, {}, set()
    for record in wandb_records(path):
        if record.HasField("run"):
            run = record.run
            updates, target = run.config.update, config
        elif record.HasField("config"):
            updates, target = record.config.update, config
        elif record.HasField("summary"):
            updates, target = record.summary.update, summary
        else:
            history |= {item.key or ".".join(item.nested_key) for item in record.history.item}
            continue
        target |= {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in updates}
    return run, config, summary, history


def tensorboard_values(folder):
    """The values of all event files in a folder, by tag."""
    values = {}
    for path in sorted(Path(folder).glob("events.out.tfevents.*")):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack("<Q", content[place : place + 8])
            event = Event.FromString(content[place + 12 : place + 12 + length])
            place += 12 + length + 4
            for value in event.summary.value:
                values.setdefault(value.tag, []).append(value)
    return values
