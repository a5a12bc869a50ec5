"""The tables of time and memory: one function for each question, from a benchmark's JSON to its rows.

A benchmark prints its table when it has run; `tables.py` writes it into the documentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from measuring import Table

Document = dict[str, Any]

PROGRAMS = {"ours": "ours", "jax": "JAX", "jax_float32": "JAX", "plain": "plain", "autograd": "tuned"}
PROGRAMS["ours_eager"] = "ours, without CUDA graphs"
"""The programs of meta_step.py, as they are called in a table."""
PRECISION_NAMES = ("float32", "bf16")


def meta_step(document: Document) -> Table:
    """How long does a meta-step take, and how much longer do the peers?"""
    peers = list(dict.fromkeys(name for row in document["rows"] for name in row["ratio"]))
    columns = ["threads", "inner steps", "ours", *(f"{PROGRAMS[name]} / ours" for name in peers)]
    rows = []
    for row in document["rows"]:
        ratios = (f"{row['ratio'][name]:.2f}" if name in row["ratio"] else "" for name in peers)
        ours = f"{row['ms']['ours']:.0f} ms" if "ours" in row["ms"] else "failed"
        rows.append([row["threads"], row["unroll"], ours, *ratios])
    return Table(columns, rows)


def meta_step_memory(document: Document) -> Table:
    """How much memory does a meta-step take, with the first number of threads?"""
    threads = document["rows"][0]["threads"]
    rows = [row for row in document["rows"] if row["threads"] == threads]
    names = list(rows[0]["working_mib"])
    what = {"working_mib": "beyond the program's imports", "peak_mib": "the whole process"}
    columns = [f"peak MiB, {counted(threads, 'thread')}", *(PROGRAMS[name] for name in names)]
    found = [
        [f"{row['unroll']} steps, {words}", *(row[kind].get(name, "") for name in names)]
        for kind, words in what.items()
        for row in rows
    ]
    return Table(columns, found)


def scaling_kernels(document: Document) -> Table:
    """What do the two kernels take for a coordinate, by their number?"""
    rows = [r for r in document["scaling"]["rows"] if "kernel_ns" in r]
    return Table(["coordinates", "ns"], [[f"{r['coordinates']:,}", f"{r['kernel_ns']:.0f}"] for r in rows])


def scaling_meta_step(document: Document) -> Table:
    """What does a meta-step take for a coordinate and inner step, by window and number of tasks?"""
    rows = [r for r in document["scaling"]["rows"] if "meta_step_ns" in r]
    found = [[r["num_tasks"], r["unroll"], f"{r['meta_step_ns']:.0f}"] for r in rows]
    return Table(["tasks", "inner steps", "ns"], found)


def cells(document: Document) -> Table:
    """What do the kernels take for cells of other sizes, and at what share of a large product's rate?"""
    rows: dict[tuple[int, int, int], str] = {}
    for row in document["rows"]:
        shares = {k: row[f"{k}_gflops"] / document["product_gflops"] for k in ("step", "bptt")}
        kernels = (f"{row[f'{kernel}_ns']:.0f} ({share:.0%})" for kernel, share in shares.items())
        rows[row["units"], row["layers"], row["inputs"]] = ", ".join(kernels)
    shapes = ((1, 1), (2, 2), (2, 32))
    columns = (f"{counted(layers, 'layer')}, {counted(inputs, 'input')}" for layers, inputs in shapes)
    units = sorted({units for units, _, _ in rows})
    return Table(["units", *columns], [[n, *(rows[n, *shape] for shape in shapes)] for n in units])


def processes(document: Document) -> Table:
    """How many meta-steps a second do several processes make, and what share is communication?"""
    columns = ["optimizees", "1 process, k tasks", "1, all tasks", "ddp, k each"]
    columns += ["weak scaling", "strong scaling", "time in communication"]
    names = {"mnist": "MNIST", "quadratic": "quadratics", "zero-shot": "`zero-shot`"}
    found = []
    for problem, scaling in document["scaling"].items():
        rows = {row["name"]: row for row in document["rows"] if row["problem"] == problem}
        pairs = " antithetic pairs" if problem == "zero-shot" else ""
        found.append(
            [
                f"{names[problem]}, k = {rows['ddp']['num_tasks']}{pairs}",
                *(f"{rows[key]['meta_steps_per_s']:.3g}" for key in ("one", "one, all tasks", "ddp")),
                *(f"{scaling[key]:.2f}" for key in ("weak", "strong")),
                f"{100 * rows['ddp']['communication']:.1f}%",
            ]
        )
    return Table(columns, found)


def optimizer_step(document: Document) -> Table:
    """What does a step of an LSTM as an optimizer take, beside AdamW's?"""
    columns = ["optimizer", "ms", "relative", "ns a coordinate", "state, bytes a coordinate"]
    rows = []
    for name, row in document["rows"].items():
        numbers = [f"{row['ms']:.1f}", f"{row['ratio']:.2f}", f"{row['ns_per_coordinate']:.1f}"]
        rows.append([name, *numbers, f"{row['state_bytes_per_coordinate']:.0f}"])
    return Table(columns, rows)


def zero_shot_step(document: Document) -> Table:
    """What does a step of the default optimizer take in ms, and its ratio to the fused AdamW's?"""
    sizes = document["in_turns"]
    names = dict.fromkeys(name for rows in sizes.values() for name in rows)

    def cell(rows: dict[str, Any], name: str) -> str:
        return f"{rows[name]['ms']:,.2f} ({rows[name]['ratio']:,.2f})" if name in rows else ""

    found = [[name, *(cell(rows, name) for rows in sizes.values())] for name in names]
    return Table(["optimizer", *sizes], found)


def large_optimizees(document: Document) -> Table:
    """What do a meta-step's states take, in memory and time, by how many of them are kept?"""
    sizes: dict[int, None] = {}
    ways: dict[str, list[str]] = {}
    for row in document["rows"]:
        sizes[row["coordinates"]] = None
        memory = row["held_mib" if row["computed"] else "working_mib"]
        seconds = row["seconds"]
        time = "?" if seconds is None else f"{seconds:{'.2g' if seconds < 100 else '.0f'}}"
        cell = f"{memory:,.0f} MiB, {time} s"
        ways.setdefault(row["name"], []).append(f"*{cell}*" if row["computed"] else cell)
    columns = ["states kept", *(f"{size:,} coordinates" for size in sizes)]
    return Table(columns, [[name, *found] for name, found in ways.items()])


def growth(document: Document) -> Table:
    """How much does a long meta-training grow for 1,000 meta-steps?"""
    found = document["growth_per_1000_meta_steps"]
    row = [f"{found['rss_kib']:.0f} KiB", f"{found['objects']:.2g}", f"{found['tensors']:.2g}"]
    return Table(["meta-steps", "resident memory", "objects", "tensors"], [[document["meta_steps"], *row]])


def rounded_products(document: Document) -> Table:
    """What does rounding in matrix products cost in accuracy, in the longest rollout measured?"""
    steps = max(row["steps"] for row in document["errors"])
    columns = ["products", "states stored in", "θ", "states", "d_φ"]
    rows = [
        [row["products"], row["state"], *(power(row[key]) for key in ("theta", "final_state", "d_phi"))]
        for row in document["errors"]
        if row["steps"] == steps
    ]
    return Table(columns, rows)


def rounded_kernels(document: Document) -> Table:
    """What do products rounded to bfloat16 gain and cost in the CPU's kernels?"""
    columns = ["LSTM", "step, float32", "bf16", "ratio", "bptt, float32", "bf16", "ratio"]
    columns += ["error of states", "of d_φ"]
    rows = []
    for row in document["cells"]:
        if row["inputs"] != row["layers"]:  # the JSON has the others
            continue
        cells = [f"{row['layers']}×{row['units']}, {counted(row['inputs'], 'input')}"]
        for kernel in ("step", "bptt"):
            cells += [f"{row[kernel]['ns'][name]:,.1f} ns" for name in PRECISION_NAMES]
            cells.append(f"{row[kernel]['ratio']:.2f}")
        rows.append([*cells, *(power(row["errors"]["bf16"][key]) for key in ("state", "d_phi"))])
    return Table(columns, rows)


def rounded_meta_steps(document: Document) -> Table:
    """What do products rounded to bfloat16 gain in a meta-step on the CPU?"""
    rows = []
    for row in document["meta_steps"]:
        times = [f"{row['ms'][name]:.0f} ms" for name in PRECISION_NAMES]
        rows.append([row["unroll"], *times, f"{row['ratio']:.2f}"])
    return Table(["inner steps", *PRECISION_NAMES, "ratio"], rows)


def rounded_meta_gradients(document: Document) -> Table:
    """How far do whole windows' meta-losses and meta-gradients differ where products are rounded?"""
    rows = [
        [
            row["rule"],
            row["unroll"],
            *(power(row[key]) if row[key] else "0" for key in ("meta_loss", "meta_gradient")),
            f"{row['cosine']:.5f}",
        ]
        for row in document["meta_gradients"]
    ]
    return Table(["rule", "inner steps", "meta-loss", "meta-gradient", "cosine"], rows)


def rounded_quality(document: Document) -> Table:
    """Does a trained rule reach the same loss where products are rounded?"""
    quality = document["quality"]
    found = [_mean(one, 4) for one in quality["final_loss"].values()]
    mean, low, high = (f"{quality['difference'][key]:.4f}" for key in ("mean", "low", "high"))
    columns = [f"final loss of {quality['optimizees']} networks", *PRECISION_NAMES, "bf16 − float32"]
    return Table(columns, [[f"`{quality['rule']}`", *found, f"{mean} ({low} to {high})"]])


def rounded_training(document: Document) -> Table:
    """Is a rule as good that is meta-trained with rounded products?"""
    rows = [
        [row["seed"], *(_mean(one, 1) for one in row["sum_of_losses"].values())] for row in document["rows"]
    ]
    return Table(["seed", *document["rows"][0]["sum_of_losses"]], rows)


def _mean(interval: Document, digits: int) -> str:
    return f"{interval['mean']:.{digits}f} ± {interval['half_width']:.{digits}f}"


def spills(document: Document) -> Table:
    """How many bytes a thread do compiled kernels spill, where 16 divides N / where it does not?"""
    kernels = document["kernels"]
    targets = list(dict.fromkeys(kernel["target"] for kernel in kernels))
    found: dict[tuple[str, str], dict[str, dict[bool, int]]] = {}
    for kernel in kernels:
        shape = "" if kernel["kernel"] == "nominal" else f"{kernel['num_layers']}x{kernel['hidden_size']}"
        by_target = found.setdefault((shape, kernel["kernel"]), {})
        by_target.setdefault(kernel["target"], {})[kernel["divisible"]] = kernel["spill_bytes"]

    def cell(bytes_: dict[bool, int]) -> str:
        return " / ".join(str(bytes_[divisible]) for divisible in (True, False) if divisible in bytes_)

    rows = [[*key, *(cell(by.get(target, {})) for target in targets)] for key, by in found.items()]
    return Table(["LSTM", "kernel", *targets], rows)


def alternatives(document: Document) -> Table:
    """What would other configurations of the kernels need on an H100?"""
    columns = ["kernel", "coordinates/warps", "other", "registers", "spilled B", "shared KiB", "at once"]
    columns += ["instructions", "of them shared", "issue ms", "special ms"]
    return Table(columns, list(_alternatives(document)))


def _alternatives(document: Document) -> Iterator[list[Any]]:
    for kernel in document["kernels"]:
        if kernel["target"] != "sm_90":
            continue
        other = "lanes" if kernel["precision"] == "none" else ""
        other = f"maxnreg {kernel['max_registers']}" if kernel["max_registers"] else other
        other = "2 launches" if kernel["launches"] == 2 else other
        counts = kernel["instructions"]
        launched = [kernel["kernel"], f"{kernel['block']}/{kernel['num_warps']}", other]
        held = [kernel["registers"], kernel["spill_bytes"], f"{kernel['shared_bytes'] / 1024:.0f}"]
        numbers = [counts["total"], counts.get("shared", 0), kernel["issue_ms"], kernel["special_ms"]]
        yield [*launched, *held, kernel["programs_at_once"], *(f"{number:.0f}" for number in numbers)]


def power(value: float) -> str:
    """Two digits and a power of ten.

    Example:
        >>> power(0.00016)
        '1.6·10⁻⁴'
    """
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}·10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def counted(number: int, what: str) -> str:
    """A number of things.

    Example:
        >>> counted(1, "layer"), counted(2, "layer")
        ('1 layer', '2 layers')
    """
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
