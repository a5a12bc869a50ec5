"""What the measured programs share: one problem, one way of timing, one way of reporting. Needs numpy alone.

The problem is a meta-step on a 784-20-10 sigmoid MLP (15,910 coordinates), minibatches of 128, with a 2x20
coordinatewise LSTM: T inner steps, the sum of the losses at their T+1 points (averaged over the tasks), its
gradient in φ with the optimizee's gradients as constants, Adam on φ; θ and the LSTM's state carry over.
φ [P] is laid out as l2l_kernels.LSTMSpec says.
"""

import argparse
import json
import resource
import statistics
import time

import numpy as np

D_IN, D_HID, D_OUT, BATCH, IMAGES = 784, 20, 10, 128, 10_000
SIZES = [D_IN * D_HID, D_HID, D_HID * D_OUT, D_OUT]
N = sum(SIZES)
HIDDEN, P_THRESHOLD, OUTPUT_SCALE, META_LR = 20, 10.0, 0.1, 1e-3
PHI_SHAPES = [(4 * HIDDEN, 2 + HIDDEN), (4 * HIDDEN,), (4 * HIDDEN, 2 * HIDDEN), (4 * HIDDEN,), (HIDDEN,), ()]
WARMUP = 2


def make_problem(path, unroll, num_tasks, reps, seed=0):
    """Writes φ, θ0 [K, N], images, labels and the minibatches' indices [meta-steps, T+1, K, B] to an .npz."""
    rng = np.random.default_rng(seed)
    bound = HIDDEN**-0.5
    np.savez(
        path,
        phi=np.concatenate([rng.uniform(-bound, bound, s).astype("f").ravel() for s in PHI_SHAPES]),
        theta=(0.1 * rng.standard_normal((num_tasks, N))).astype("f"),
        images=rng.random((IMAGES, D_IN), "f"),
        labels=rng.integers(0, D_OUT, IMAGES),
        indices=rng.integers(0, IMAGES, (1 + WARMUP + reps, unroll + 1, num_tasks, BATCH)),
    )


def resident_mib():
    """Memory of this process that is in RAM now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def main(name, prepare, peak_device_bytes):
    """Runs one program on the problem named on the command line and prints one line of JSON.

    Every program has imported its libraries by now; memory above that is what its work takes, what its
    library compiles included.

    Args:
        name: The library, as it is imported; its version is reported.
        prepare: Takes the problem's arrays and the options (device, cuda_graphs) and returns
            meta_step(indices [T+1, K, B]), which performs one meta-step, waits for it, and returns the
            meta-loss and the meta-gradient [P].
        peak_device_bytes: Gives the most memory that was in use on the GPU; called on a GPU only.
    """
    imported_mib = resident_mib()
    parser = argparse.ArgumentParser()
    parser.add_argument("--problem", required=True)
    parser.add_argument("--output", required=True, help="where the first meta-loss and meta-gradient go")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-cuda-graphs", action="store_false", dest="cuda_graphs")
    args = parser.parse_args()
    with np.load(args.problem) as file:
        problem = dict(file)
    meta_step = prepare(problem, args)
    first, *warmup_and_timed = problem["indices"]
    loss, gradient = meta_step(first)
    np.savez(args.output, loss=np.asarray(loss), gradient=np.asarray(gradient.tolist()))
    times = []
    for indices in warmup_and_timed:
        start = time.perf_counter()
        meta_step(indices)
        times.append(1e3 * (time.perf_counter() - start))
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report = {
        "ms": statistics.median(times[WARMUP:]),
        "peak_mib": peak_mib,
        "working_mib": peak_mib - imported_mib,
        "device_mib": None if args.device == "cpu" else peak_device_bytes() / 2**20,
        "version": __import__(name).__version__,
    }
    print(json.dumps(report))
