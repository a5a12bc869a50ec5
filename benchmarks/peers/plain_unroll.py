"""The plain PyTorch peer: the paper's method as it is commonly written, with torch.nn.LSTMCell and autograd.

One graph holds the optimizee's and the LSTM's operations of the whole window, and one backward pass goes
through it. `autograd_unroll.py` is the same with a cell that was written for speed.
"""

import torch
import torch._dynamo  # an import of torch.optim's, which comes with the first optimizer
import torch.nn.functional as F
from harness import D_HID, D_IN, D_OUT, HIDDEN, META_LR, OUTPUT_SCALE, P_THRESHOLD, PHI_SHAPES, SIZES, main
from torch import nn


def loss_of(theta, images, labels):  # [N], [B, 784], [B] -> []
    w1, b1, w2, b2 = theta.split(SIZES)
    hidden = torch.sigmoid(images @ w1.view(D_IN, D_HID) + b1)
    return F.cross_entropy(hidden @ w2.view(D_HID, D_OUT) + b2, labels)


def preprocess(grad):  # [n] -> [n, 2]
    magnitude = (grad.abs().log() / P_THRESHOLD).clamp(min=-1)
    sign = (grad * torch.tensor(P_THRESHOLD).exp()).clamp(-1, 1)
    return torch.stack([magnitude, sign], 1)


class Rule(nn.Module):
    """Two cells and a head; a cell's second bias, which our layout has not, starts at zero."""

    def __init__(self, phi):
        super().__init__()
        self.cells = nn.ModuleList([nn.LSTMCell(2, HIDDEN), nn.LSTMCell(HIDDEN, HIDDEN)])
        self.head = nn.Linear(HIDDEN, 1)
        sizes = [torch.Size(shape).numel() for shape in PHI_SHAPES]
        w1, b1, w2, b2, head_weight, head_bias = phi.split(sizes)
        with torch.no_grad():
            for cell, weight, bias in zip(self.cells, (w1, w2), (b1, b2), strict=True):
                weight = weight.view(4 * HIDDEN, -1)
                cell.weight_ih.copy_(weight[:, :-HIDDEN])
                cell.weight_hh.copy_(weight[:, -HIDDEN:])
                cell.bias_ih.copy_(bias)
                cell.bias_hh.zero_()
            self.head.weight.copy_(head_weight.view(1, HIDDEN))
            self.head.bias.copy_(head_bias)

    def forward(self, grad, state):
        x, new_state = preprocess(grad), []
        for cell, (h, c) in zip(self.cells, state, strict=True):
            x, c = cell(x, (h, c))
            new_state.append((x, c))
        return OUTPUT_SCALE * self.head(x).squeeze(1), new_state

    def gradient(self):
        """The gradient in φ, [P], in our layout."""
        parts = []
        for cell in self.cells:
            parts += [torch.cat([cell.weight_ih.grad, cell.weight_hh.grad], 1).flatten(), cell.bias_ih.grad]
        return torch.cat([*parts, self.head.weight.grad.flatten(), self.head.bias.grad])


def prepare(problem, options):
    images, labels, theta, phi = (
        torch.from_numpy(problem[name]).to(options.device) for name in ("images", "labels", "theta", "phi")
    )
    rule = Rule(phi).to(options.device)
    adam = torch.optim.Adam(rule.parameters(), lr=META_LR)
    thetas = list(theta)
    states = [[(t.new_zeros(len(t), HIDDEN),) * 2 for _ in rule.cells] for t in thetas]

    def meta_step(indices):  # [T+1, K, B]
        indices = torch.from_numpy(indices).to(options.device)
        meta_loss = 0.0
        for k in range(len(thetas)):
            theta = thetas[k].detach().requires_grad_()
            state = [(h.detach(), c.detach()) for h, c in states[k]]
            for t, index in enumerate(indices[:, k]):
                loss = loss_of(theta, images[index], labels[index])
                meta_loss = meta_loss + loss / len(thetas)
                if t + 1 < len(indices):
                    (grad,) = torch.autograd.grad(loss, theta, retain_graph=True)
                    update, state = rule(grad, state)
                    theta = theta + update
            thetas[k], states[k] = theta, state
        adam.zero_grad()
        meta_loss.backward()
        gradient = rule.gradient()
        adam.step()
        return meta_loss.item(), gradient

    return meta_step


if __name__ == "__main__":
    main("torch", prepare, torch.cuda.max_memory_allocated)
