"""SFR on every family of the installed timm, with no setting: the smallest classifier in each of its modules."""

import random
import re

import pytest
import timm
import torch
from torch import nn

from benchmarks.families import CLASSES, HEAD, LARGE, PAGE, Row, classifiers, on_meta, plan_of, smallest, step_of
from timm_sfr import SFRTask, UserError
from timm_sfr.config import HubConfig
from timm_sfr.hub.card import Facts
from timm_sfr.hub.model_folder import Exporter
from timm_sfr.method.probe import forward_taps
from timm_sfr.models import SMALL_IMAGE_MODELS

NAMES = classifiers()
EVERY = sorted(set(timm.list_models()) - set(SMALL_IMAGE_MODELS))
# The page says which model is the smallest, which takes minutes to find out; a module that it lacks is searched.
LISTED = {row[0]: row for line in PAGE.read_text().splitlines() if (row := line.strip("| ").split(" | "))[0] in NAMES}
# The default run's share: odd ones first, then every twelfth.
ODD = ("coat", "crossvit", "efficientvim", "hiera", "hrnet", "levit", "naflexvit", "pit", "tnt", "tresnet", "xcit", "mvitv2",
       "rexnet", "efficientnet", "mlp_mixer", "swin_transformer", "repvit", "densenet")  # fmt: skip
USUAL = {*ODD, *sorted(NAMES)[::12]} - {"convmixer"}  # whose smallest model takes as long as ten others
# Built for real they would not fit into the time of a test.
BIG = 25e6


def model_of(module):
    return LISTED[module][1].strip("`") if module in LISTED else smallest(NAMES[module])[0]


SHARES = [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in sorted(NAMES)]


@pytest.mark.parametrize("module", SHARES)
def test_taps_with_no_setting(module):
    assert all(tap.nodes >= 4 for tap in plan_of(model_of(module)).taps)


@pytest.mark.parametrize("module", SHARES)
def test_one_step_with_no_setting(module, request):
    name = model_of(module)
    parameters = sum(p.numel() for p in on_meta(name).parameters())
    if parameters > LARGE or (parameters > BIG and request.config.getoption("-m") == "not slow"):
        pytest.skip(f"{parameters / 1e6:.0f} M parameters take too long to train; its taps have a test of their own")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES)
    task = SFRTask(model, verbose=False)
    images, target = torch.randn(2, *task.plan.input_size), torch.tensor([0, 1])
    assert all(tap.nodes >= 4 for tap in (*task.plan.shallow, task.plan.deep))

    result = task(images, target)
    result["loss"].backward()
    assert result["loss"].isfinite() and result["sfr_loss"] > 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)
    assert trained[0].grad.abs().sum() > 0 or trained[1].grad.abs().sum() > 0

    # One pass with taps is the plain pass, in training with the same seed, and in evaluation on statistics of these images.
    calibrated(model, images)
    with torch.no_grad():
        for train in (True, False):
            model.train(train)
            torch.manual_seed(1)
            plain = model(images)
            torch.manual_seed(1)
            logits, maps = forward_taps(model, images, task.plan.indices)
            moved = (plain[0] - plain[1]).abs().max()
            assert torch.allclose(logits, plain, rtol=0, atol=1e-6 * plain.abs().max() + 1e-3 * moved), (train, moved)
    taps = [*task.plan.shallow, task.plan.deep]
    assert [tuple(x.shape[1:]) for x in maps] == [(tap.channels, *tap.grid) for tap in taps]


def calibrated(model, images):
    """BatchNorm's statistics become those of these images: an untrained net's output hardly depends on its input."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@pytest.mark.slow
def test_taps_of_every_model():
    refused = [name for name in EVERY if not check_taps(name)]
    assert len(EVERY) - len(refused) >= 1364 and all(name.endswith("_enc") for name in refused)


@pytest.mark.slow
def test_one_step_of_thirty_more():
    """Of any family, at most of some size, none of them named above."""
    named = {model_of(module) for module in NAMES}
    more = random.Random(7).sample(sorted(set(EVERY) - named), 60)
    sizes = {name: sum(p.numel() for p in on_meta(name).parameters()) for name in more if not name.endswith("_enc")}
    small = [name for name, size in sizes.items() if size < LARGE / 5][:30]
    found = {name: step_of(name) for name in small}
    assert len(found) == 30 and set(found.values()) == {"ok"}, found


def check_taps(name):
    """Whether it has a classifier; if so, its plan is sound."""
    if getattr(on_meta(name), "num_classes", 0) == 0:
        with pytest.raises(UserError, match="has no classifier"):
            plan_of(name)
        return False
    plan = plan_of(name)
    assert plan.shallow and plan.deep.nodes >= 4 and plan.num_classes == CLASSES
    assert all(tap.index < plan.deep.index and tap.module != plan.deep.module for tap in plan.shallow)
    assert all(h * w >= 4 and h * w <= 49 for h, w in plan.node_grids(49))
    return True


@pytest.mark.parametrize("name", ["resnet10t", "crossvit_tiny_240", "vit_tiny_patch16_224"])
def test_the_same_seed_gives_the_same_step(name):
    def step():
        torch.manual_seed(3)
        task = SFRTask(timm.create_model(name, num_classes=CLASSES, drop_rate=0.1), verbose=False)
        loss = task(torch.randn(2, *task.plan.input_size), torch.tensor([0, 1]))["loss"]
        loss.backward()
        return [loss.detach(), *(p.grad for p in task.parameters())]

    assert all(torch.equal(one, two) for one, two in zip(step(), step(), strict=True))


def test_the_page_is_current():
    """Every module is on it; a sample of rows is measured again."""
    assert set(LISTED) == set(NAMES), "run python -m benchmarks.families"
    assert re.search(rf"modules of timm\s+{re.escape(timm.__version__)}\.", PAGE.read_text())
    for module in random.Random(1).sample(sorted(NAMES), 12):
        name = model_of(module)
        columns = HEAD.index("nodes") + 1
        row = Row(module, name, sum(p.numel() for p in on_meta(name).parameters()), plan_of(name), None, "")
        assert row.cells()[:columns] == LISTED[module][:columns], "run python -m benchmarks.families"


@pytest.mark.parametrize("name", ["crossvit_tiny_240", "coat_tiny"])
def test_parallel_branches(name):
    """Features of one module are equally deep, wherever the list has them."""
    plan = plan_of(name)
    assert plan.deep.module not in {tap.module for tap in plan.shallow} and "parallel branches" in str(plan)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "levit_128s", "pit_ti_distilled_224",
                                  "efficientformer_l1", "repvit_m0_9"])  # fmt: skip
def test_two_logits_are_trained_as_they_are_used(name):
    """Distilled training without a teacher: their mean, as at inference."""
    model = timm.create_model(name, num_classes=CLASSES)
    model.set_distilled_training(True)
    task = SFRTask(model, verbose=False)
    images, target = torch.randn(2, *task.plan.input_size), torch.tensor([0, 1])
    task.trainable_module.train()
    torch.manual_seed(1)
    both = model.forward_head(model.forward_features(images))
    torch.manual_seed(1)
    result = task(images, target)
    assert len(both) == 2 and torch.allclose(result["output"], (both[0] + both[1]) / 2, atol=1e-4)
    result["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_naflex():
    """Images of one size, yes; dictionaries of patches, no."""
    model = timm.create_model("naflexvit_base_patch16_gap", num_classes=CLASSES, embed_dim=64, num_heads=2, depth=4)
    task = SFRTask(model, verbose=False)
    result = task(torch.randn(2, *task.plan.input_size), torch.tensor([0, 1]))
    assert result["sfr_loss"] > 0 and len(task.plan.shallow) == 3
    with pytest.raises(UserError, match="got dict; load the images of NaFlex models at one size"):
        task({"patches": torch.randn(2, 196, 768)}, torch.tensor([0, 1]))


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "xcit_nano_12_p16_224", "convnext_atto",
                                  "efficientvim_m1", "edgenext_xx_small"])  # fmt: skip
def test_checkpointing_layout_and_precision(name):
    """Recomputed activations and another memory layout change nothing; in bfloat16 the losses are float32's."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES).eval()  # no dropout: the same pass each time
    task = SFRTask(model, verbose=False)
    images, target = torch.randn(2, *task.plan.input_size), torch.tensor([0, 1])

    def gradient(images):
        task.zero_grad()
        result = task(images, target)
        result["loss"].backward()
        return result, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    result, plain = gradient(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = task(images, target)
    assert half["loss"].dtype == half["sfr_loss"].dtype == torch.float32
    assert half["sfr_loss"].item() == pytest.approx(result["sfr_loss"].item(), rel=0.1)
    model.set_grad_checkpointing(True)
    _, recomputed = gradient(images)
    assert torch.allclose(recomputed, plain, atol=1e-5 * plain.abs().max())
    model.set_grad_checkpointing(False)
    # In float64, with SFR's losses in float32: in float32 alone EfficientViM's gradients differ by 5e-3 between layouts, on some
    # processors and without SFR too.
    task.trainable_module.double()
    _, plain = gradient(images.double())
    task.trainable_module.to(memory_format=torch.channels_last)
    _, other = gradient(images.double().to(memory_format=torch.channels_last))
    assert torch.allclose(other, plain, atol=1e-4 * plain.abs().max())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", *(pytest.param(name, marks=pytest.mark.slow)
                                  for name in ("crossvit_tiny_240", "coat_lite_tiny", "efficientvim_m1"))])  # fmt: skip
def test_compiles_without_graph_breaks(name):
    torch._dynamo.reset()
    task = SFRTask(timm.create_model(name, num_classes=CLASSES).eval(), verbose=False)
    images = torch.randn(2, *task.plan.input_size)
    logits, nodes = torch.compile(task.trainable_module, backend="eager", fullgraph=True)(images)
    plain = task.trainable_module(images)
    assert torch.allclose(logits, plain[0], atol=1e-4) and torch.allclose(nodes[0], plain[1][0], atol=1e-3)


def test_weights_that_a_model_shares_are_saved(tmp_path):
    """CoaT's blocks share some; safetensors holds each name once, and timm loads it."""
    model = timm.create_model("coat_tiny", num_classes=CLASSES).eval()
    Exporter(model, None, None, HubConfig()).write(tmp_path / "model", model.state_dict(), Facts())
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
