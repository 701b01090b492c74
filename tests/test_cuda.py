"""What only a GPU can show; skipped without one."""

import json

import pytest
import timm
import torch
from conftest import finished_run

from timm_sfr import SFRConfig, SFRTask, emd_l2, transport_plan
from timm_sfr.method.sinkhorn import cost_matrix, unit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("channels", ["groups", "transport", "projection"])
@pytest.mark.parametrize("source", ["uniform", "classes"])
def test_a_step_never_waits_for_the_device(channels, source):
    model = timm.create_model("resnet18_cifar").cuda()
    task = SFRTask(model, SFRConfig(channels=channels, smoothing_source=source), verbose=False)
    images, target = torch.randn(8, 3, 32, 32, device="cuda"), torch.arange(8, device="cuda")
    task(images, target)["loss"].backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        task(images, target)["loss"].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_plan_is_that_of_the_cpu():
    u, v = unit(torch.randn(8, 49, 64)), unit(torch.randn(8, 16, 64))
    cost = cost_matrix(u, v)
    ours, theirs = transport_plan(cost), transport_plan(cost.cuda()).cpu()
    assert torch.allclose((ours * cost).sum((1, 2)), (theirs * cost).sum((1, 2)), rtol=1e-3)


@pytest.mark.parametrize("nodes", [(49, 49), (16, 49), (196, 49)])
def test_the_triton_program_is_the_eager_solver(nodes):
    u, v = (unit(torch.randn(8, n, 64, device="cuda")) for n in nodes)
    found = []
    for solver in ("sinkhorn", "triton"):
        shallow = u.clone().requires_grad_()
        loss = emd_l2(shallow, v, solver=solver)
        loss.backward()
        found.append((transport_plan(cost_matrix(u, v), solver=solver), loss.detach(), shallow.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_float32_under_autocast(dtype):
    x = (torch.randn(4, 16, 32, device="cuda") * 1e4).to(dtype).requires_grad_()
    with torch.autocast("cuda", dtype=dtype):
        loss = emd_l2(x, torch.randn(4, 16, 32, device="cuda", dtype=dtype))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and x.grad.isfinite().all()


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_trains(precision, tmp_path):
    words = ("--epochs", 8, "--channels-last", "--clip-grad", 1, "--model-ema", "--model-ema-decay", 0.9)
    run_dir, _ = finished_run(tmp_path, "--mixed-precision", precision, *words)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["last"]["val_top1"] >= 90 and metrics["mixed_precision"] == precision
