"""The PyTorch peer: the unrolled graph, differentiated by autograd.

What most people write, sensibly: one flat θ for all coordinates, detached gradients, a functional LSTM with
one GEMM a layer, and one backward pass through the whole window.
"""

import torch
import torch._dynamo  # an import of torch.optim's, which comes with the first optimizer
import torch.nn.functional as F
from harness import D_HID, D_IN, META_LR, OUTPUT_SCALE, P_THRESHOLD, PHI_SHAPES, SIZES, main


def losses_of(theta, images, labels):  # [K, N], [K, B, 784], [K, B] -> [K]
    K = len(theta)
    w1, b1, w2, b2 = theta.split(SIZES, dim=1)
    hidden = torch.sigmoid(torch.baddbmm(b1[:, None], images, w1.view(K, D_IN, D_HID)))
    logits = torch.baddbmm(b2[:, None], hidden, w2.view(K, D_HID, -1))
    return F.cross_entropy(logits.mT, labels, reduction="none").mean(1)


def lstm_cell(weight, bias, x, h, c):  # [n, .] -> [n, H]
    i, f, g, o = F.linear(torch.cat([x, h], 1), weight, bias).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def prepare(problem, options):
    images, labels, theta, phi = (
        torch.from_numpy(problem[name]).to(options.device) for name in ("images", "labels", "theta", "phi")
    )
    sizes = [torch.Size(shape).numel() for shape in PHI_SHAPES]
    parts = phi.split(sizes)
    phi = [
        part.reshape(shape).clone().requires_grad_() for part, shape in zip(parts, PHI_SHAPES, strict=True)
    ]
    w1, b1, w2, b2, head_weight, head_bias = phi
    adam = torch.optim.Adam(phi, lr=META_LR)
    state = [theta.new_zeros(theta.numel(), len(head_weight)) for _ in range(4)]

    def update(grad):
        nonlocal state
        h1, c1, h2, c2 = state
        magnitude = (grad.abs().log() / P_THRESHOLD).clamp(min=-1)
        sign = (grad * torch.tensor(P_THRESHOLD).exp()).clamp(-1, 1)
        h1, c1 = lstm_cell(w1, b1, torch.stack([magnitude, sign], 1), h1, c1)
        h2, c2 = lstm_cell(w2, b2, h1, h2, c2)
        state = [h1, c1, h2, c2]
        return OUTPUT_SCALE * (h2 @ head_weight + head_bias)

    def meta_step(indices):
        nonlocal theta, state
        theta, state = theta.detach().requires_grad_(), [s.detach() for s in state]
        meta_loss = theta.new_zeros(())
        for t, index in enumerate(torch.from_numpy(indices).to(options.device)):
            losses = losses_of(theta, images[index], labels[index])
            meta_loss = meta_loss + losses.mean()
            if t + 1 < len(indices):
                (grad,) = torch.autograd.grad(losses.sum(), theta, retain_graph=True)
                theta = theta + update(grad.detach().view(-1)).view_as(theta)
        adam.zero_grad()
        meta_loss.backward()
        gradient = torch.cat([part.grad.view(-1) for part in phi])
        adam.step()
        return meta_loss.item(), gradient

    return meta_step


if __name__ == "__main__":
    main("torch", prepare, torch.cuda.max_memory_allocated)
