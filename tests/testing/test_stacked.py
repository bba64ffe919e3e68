"""Problems of several projections: one X, truth that is the sum over them."""

import torch

from lora_kernels.testing.stacked import make_mlp, make_stacked, plain_mlp, plain_stacked, truth_mlp, truth_stacked


def test_projections_share_x_and_nothing_else():
    q, k, v = make_stacked(6, 10, (8, 8, 4), (2, 2, 3), torch.float64, scalings=(1.0, 2.0, 3.0), adjacent=True)
    assert q.X is k.X is v.X
    assert q.seed is v.seed
    assert not torch.equal(q.W, k.W)
    assert not torch.equal(q.A, k.A)
    assert (q.bias is None, k.bias is None, v.scaling) == (False, True, 3.0)
    assert k.W.untyped_storage().data_ptr() == q.W.untyped_storage().data_ptr()


def test_results_are_those_of_separate_layers_with_one_gradient_of_x():
    problems = make_stacked(6, 10, (8, 5), (2, 3), torch.float64)
    X = problems[0].X.clone().requires_grad_()
    Y = [torch.nn.functional.linear(X, q.W + q.scaling * q.B @ q.A, q.bias) for q in problems]
    (dX,) = torch.autograd.grad(Y, X, [q.dY for q in problems])
    found = truth_stacked(problems)
    torch.testing.assert_close(found["dX"], dX)
    torch.testing.assert_close(found["Y1"], Y[1].detach())
    assert set(found) == {"Y0", "Y1", "dX", "dA0", "dA1", "dB0", "dB1", "dbias0"}
    assert set(plain_stacked(problems, live=[1])) == {"Y0", "Y1", "dX", "dA1", "dB1"}


def test_a_block_is_its_three_layers():
    gate, up, down = problems = make_mlp(6, 10, 12, 8, (2, 3, 4), torch.float64)

    def layer(q, X):
        return torch.nn.functional.linear(X, q.W + q.scaling * q.B @ q.A, q.bias)

    found = truth_mlp(problems)
    torch.testing.assert_close(
        found["Y"], layer(down, torch.nn.functional.silu(layer(gate, gate.X)) * layer(up, gate.X))
    )
    grads = {f"d{name}{i}" for name in ("A", "B", "bias") for i in range(3)} - {"dbias1"}
    assert set(found) == set(plain_mlp(problems)) == {"Y", "dX"} | grads
    nothing = torch.zeros(6, 12, dtype=torch.bool)
    assert (
        truth_mlp(make_mlp(6, 10, 12, 8, (2, 3, 4), torch.float64, dropout_p=0.5), None, nothing)["dA2"].abs().max()
        == 0
    )
