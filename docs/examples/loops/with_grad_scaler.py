"""Mixed precision in float16: a GradScaler, whose scale is taken off the gradients before the step.

python docs/examples/loops/with_grad_scaler.py
"""

import torch
from small_problem import STEPS, make_loader, make_network, mse

from l2l_lightning import LearnedOptimizer


def main(device="cpu", autocast=True, overflow_at=None):
    """Returns the trained network and its optimizer; gradients can be made to overflow at one step."""
    network = make_network().to(device)
    optimizer = LearnedOptimizer(network.parameters(), total_steps=STEPS)
    scaler = torch.amp.GradScaler(device)
    for step, (inputs, labels) in enumerate(make_loader()):
        with torch.autocast(device, torch.float16, enabled=autocast):
            predicted = network(inputs.to(device))
        loss = mse(predicted.float(), labels.to(device)) * (float("inf") if step == overflow_at else 1)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # without the scale; not at all if a gradient is not finite
        scaler.update()
    return network, optimizer


if __name__ == "__main__":
    print(main("cuda" if torch.cuda.is_available() else "cpu")[0])
