"""Every differentiable operator over small leaves, for tests of derivatives of any kind."""

import torch

import lora_kernels as lk
from lora_kernels.autograd.lora_conv import lora_conv
from lora_kernels.autograd.lora_embedding import lora_embedding
from lora_kernels.operands.slots import Slots

SEED = 5


class FixedNorm:
    """Norms that no A or B changes, so that finite differences see what DoRA differentiates."""

    def __init__(self, norm):
        self.value = norm

    def norm(self, *_):
        return self.value


def leaf(*shape, dtype=torch.float64, generator):
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def case(name, p=0.0, bias=True, dtype=torch.float64, backend="reference"):
    """(function, leaves): function(*leaves) is the operator's output, or the outputs' sum of squares for several.

    The leaves are X (of three dimensions, but for the embedding, which has none), every A and B, m, and biases.
    """
    g = torch.Generator().manual_seed(3)

    def new(*shape):
        return leaf(*shape, dtype=dtype, generator=g)

    how = {"dropout_p": p, "seed": SEED, "backend": backend}
    N, K, r = 5, 4, 2
    W, X = new(N, K).detach(), new(2, 3, K)
    A, B, b = new(r, K), new(N, r), [new(N)] if bias else []
    if name == "linear":
        return lambda X, A, B, b=None: lk.lora_linear(X, W, A, B, b, scaling=1.7, **how), (X, A, B, *b)
    if name == "dora":
        m, norms = new(N), FixedNorm(new(N).detach().abs() + 0.5)
        how["norms"] = norms
        return lambda X, A, B, m, b=None: lk.dora_linear(X, W, A, B, m, b, scaling=1.7, **how), (X, A, B, m, *b)
    if name == "stacked":
        V, C, D = new(3, K).detach(), new(1, K), new(3, 1)

        def stacked(X, A, B, C, D, b=None):
            first, second = lk.Projection(W, A, B, b, 1.7), lk.Projection(V, C, D, None, 0.6)
            return torch.cat(lk.lora_linear_stacked(X, [first, second], **how), -1)

        return stacked, (X, A, B, C, D, *b)
    if name == "mlp":
        U, V = new(N, K).detach(), new(K, N).detach()
        more, biases = (new(r, K), new(N, r), new(1, N), new(K, 1)), (new(N), new(N), new(K)) if bias else ()

        def mlp(X, A, B, Au, Bu, Ad, Bd, *biases):
            b = biases or (None, None, None)
            parts = (W, A, B, b[0], 1.7), (U, Au, Bu, b[1], 0.6), (V, Ad, Bd, b[2], 1.1)
            return lk.lora_mlp(X, *(lk.Projection(*part) for part in parts), **how)

        return mlp, (X, A, B, *more, *biases)
    if name == "embedding":
        ids, V = torch.tensor([[1, 6, 1], [0, 2, 6]]), new(7, N).detach()
        C, D = new(1, 7), new(N, 1)

        def embed(A, B, C, D):
            return lora_embedding(ids, V, A, B, scaling=1.7, more=[(C, D, 0.6)], padding_idx=3, base_scale=2.0)

        return embed, (new(r, 7), B, C, D)
    if name in ("conv", "grouped conv"):
        groups = 1 if name == "conv" else 2
        V, b = new(4, 4 // groups, 3, 3).detach(), (new(4), new(4)) if bias else ()
        keys = {"scaling": 1.7, "dropout_p": p, "seed": SEED, "stride": (1, 2), "padding": 1, "groups": groups}

        def conv(X, A, B, b=None, c=None):
            return lora_conv(X, V, A, B, b, lora_bias=c, **keys)

        return conv, (new(1, 4, 4, 3), new(2, 4, 3, 3), new(4, 2 // groups, 1, 1), *b)
    assert name == "multi"
    ids = torch.tensor([[0, 2, -1], [2, 0, 1]])
    lists = [new(1, K), new(2, K), new(r, K)], [new(N, 1), new(N, 2), new(N, r)]

    def multi(X, *flat):
        slots = Slots.of(flat[:3], flat[3:6], None, (0.6, 2.0, 1.7))
        return lk.multi_lora_linear(X, W, slots, ids, flat[6] if bias else None, backend=backend)

    return multi, (X, *lists[0], *lists[1], *b)


NAMES = ("linear", "dora", "stacked", "mlp", "embedding", "conv", "grouped conv", "multi")
DROPS = tuple(name for name in NAMES if name not in ("embedding", "multi"))
